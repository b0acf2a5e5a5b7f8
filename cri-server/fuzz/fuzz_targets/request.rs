#![no_main]

use cri_server::streaming::hostile::request;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    request(script).expect("the server keeps its word");
});
