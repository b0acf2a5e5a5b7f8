#![no_main]

use drupe_vmm::devices::hostile::{Script, targets};

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    targets::vsock(Script::new(script)).expect("the host's side of the device");
});
