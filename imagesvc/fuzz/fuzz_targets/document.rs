#![no_main]

use imagesvc::hostile::document;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    document(script).expect("taken or refused");
});
