#![no_main]

use drupe_unpacker::hostile::layer;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    layer(script).expect("taken or refused");
});
