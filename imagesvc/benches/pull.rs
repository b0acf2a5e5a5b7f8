//! What a pull takes: of many small layers, where starting processes counts,
//! and of a large one, where moving bytes does. Over HTTP on loopback, from
//! this very process, so that the registry's part is in the figures.
//! `cargo bench -p imagesvc --bench pull`; needs root.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on ends")]

#[allow(dead_code, reason = "not all that tests need")]
#[path = "../tests/it/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use support::http::{Server, registry_reply};
use support::image::{Layer, Packing, TestImage, noise};
use support::open;

const ROUNDS: usize = 7;
const MANY: usize = 100;
const LARGE: usize = 512 << 20;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let small = |seed| Layer::new(Packing::Gzip, &[("file", &noise(4000, seed as u64))]);
    let images = [
        (
            "100 layers of 4 KiB",
            TestImage::new((0..MANY).map(small).collect()),
        ),
        ("1 layer of 4 KiB", TestImage::new(vec![small(7)])),
        ("512 MiB, gzip", large(Packing::Gzip)),
        ("512 MiB, zstd", large(Packing::Zstd)),
    ];
    println!("| image | median ms | least | most | CPU ms | of it processes |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for (name, image) in &images {
        let (mut times, before) = (Vec::new(), cpu());
        for _ in 0..ROUNDS {
            times.push(runtime.block_on(pull(image)));
        }
        times.sort_unstable();
        let after = cpu();
        let ms = |time: Duration| time.as_micros() as f64 / 1000.0;
        let part = |after: Duration, before: Duration| ms(after - before) / ROUNDS as f64;
        let (own, children) = (part(after.0, before.0), part(after.1, before.1));
        println!(
            "| {name} | {:.1} | {:.1} | {:.1} | {:.1} | {children:.1} |",
            ms(times[ROUNDS / 2]),
            ms(times[0]),
            ms(times[ROUNDS - 1]),
            own + children,
        );
    }
}

/// Text of few words, of which a third is left when it is compressed.
fn large(packing: Packing) -> TestImage {
    let random = noise(LARGE / 4, 3);
    let mut content = Vec::with_capacity(LARGE);
    for bytes in random.chunks_exact(4) {
        content.extend_from_slice(&[b'a' + bytes[0] % 16, b'a' + bytes[1] % 4, bytes[2] % 8, 0]);
    }
    let parts: Vec<(String, &[u8])> = content
        .chunks(8 << 20)
        .enumerate()
        .map(|(number, part)| (format!("part-{number}"), part))
        .collect();
    let files: Vec<(&str, &[u8])> = parts
        .iter()
        .map(|(name, part)| (&name[..], *part))
        .collect();
    TestImage::new(vec![Layer::new(packing, &files)])
}

async fn pull(image: &TestImage) -> Duration {
    let server = {
        let image = image.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let root = tempfile::tempdir_in("/var/tmp").unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", server.host());
    let begun = Instant::now();
    service.pull(&name, None).await.unwrap();
    begun.elapsed()
}

/// Of this process, and of those that have ended.
fn cpu() -> (Duration, Duration) {
    let of = |who| {
        let usage = getrusage(who).unwrap();
        [usage.user_time(), usage.system_time()]
            .map(|time| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()) as u64))
            .iter()
            .sum()
    };
    (of(UsageWho::RUSAGE_SELF), of(UsageWho::RUSAGE_CHILDREN))
}
