use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        .codec_path("crate::codec::BoundedCodec")
        // A test compares it with what bounds are stated.
        .file_descriptor_set_path(out.join("agent.descriptors"))
        .compile_protos(&["proto/agent.proto"], &["proto"])?;
    Ok(())
}
