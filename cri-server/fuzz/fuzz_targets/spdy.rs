#![no_main]

use cri_server::streaming::hostile::spdy;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    spdy(script).expect("the server keeps its word");
});
