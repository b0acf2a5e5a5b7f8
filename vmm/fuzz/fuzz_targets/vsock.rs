#![no_main]

use drupe_vmm::devices::hostile::targets;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    targets::vsock(script).expect("the host's side of the device");
});
