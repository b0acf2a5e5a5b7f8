#![no_main]

use cri_server::streaming::hostile::websocket;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    websocket(script).expect("the server keeps its word");
});
