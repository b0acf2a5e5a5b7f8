#![no_main]

use std::sync::{LazyLock, Mutex};

use drupe_vmm::devices::hostile::targets::{World, fs_world};

static WORLD: LazyLock<Mutex<World>> =
    LazyLock::new(|| Mutex::new(fs_world().expect("namespaces: be root")));

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    let world = WORLD.lock().expect("no panic before");
    world.play(script).expect("the host's side of the device");
});
