use std::env;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        // Credentials: `src/lib.rs` says what may be shown of them.
        .skip_debug([".runtime.v1.AuthConfig"])
        // What the tests compare.
        .file_descriptor_set_path(out.join("wire.bin"))
        .compile_protos(&["proto/runtime.proto", "proto/image.proto"], &["proto"])?;
    Ok(())
}
