#![no_main]

use std::sync::{LazyLock, Mutex};

use drupe_vmm::devices::hostile::targets::Raced;

static RACED: LazyLock<Mutex<Raced>> =
    LazyLock::new(|| Mutex::new(Raced::new().expect("namespaces: be root")));

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    let raced = RACED.lock().expect("no panic before");
    raced.play(script).expect("the host's side of the device");
});
