//! Unpackers that a layer has taken over: what they can make the image service
//! believe.
//!
//! This program is the test, and run by the image service an unpacker: the
//! layer's digest says which of them lies, and how. Needs root.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[allow(dead_code, reason = "not all that other tests need")]
#[path = "../it/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use drupe_unpacker::session::Session;
use imagesvc::{Digest, Error, ErrorKind, ImageService, ImageServiceConfig, Unpacker};
use unpacker_client::{Done, Word, Written};

use support::http::{Server, registry_reply};
use support::image::{Layer, OCI_MANIFEST, Packing, TestImage, host_arch, noise};
use support::{files, unpacker, unpackers};

const LIMIT: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// Who lies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Decompress,
    Write,
}

struct Case {
    name: &'static str,
    liar: Half,
    lie: fn(&Session, Vec<File>),
    check: fn(&Pulled),
}

/// What has come of a pull.
struct Pulled {
    result: Result<imagesvc::PulledImage, Error>,
    root: tempfile::TempDir,
    digest: Digest,
}

impl Pulled {
    /// It has failed, and left nothing.
    fn refused(&self, kind: ErrorKind, part: &str) {
        let error = self.result.as_ref().unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let text = error.to_string();
        assert!(text.contains(part), "{text}");
        assert_eq!(files(self.root.path()), [""; 0]);
    }

    /// What stands under the name of `layer`.
    fn image_of(&self, layer: &Layer) -> Vec<u8> {
        let name = format!("layers/v2/{}.erofs", layer.diff_id.hex());
        fs::read(self.root.path().join(name)).unwrap()
    }
}

const CASES: &[Case] = &[
    Case {
        name: "the first sends another layer's archive",
        liar: Half::Decompress,
        lie: |session, mut files| {
            files[1].write_all(&victim().bytes).unwrap();
            say(session, Done::Decompressed);
        },
        // Then it is that layer, and the image is made of it.
        check: |pulled| {
            pulled.result.as_ref().unwrap();
            let honest = pull(&TestImage::new(vec![victim()]), unpacker());
            honest.result.as_ref().unwrap();
            assert!(pulled.image_of(&victim()) == honest.image_of(&victim()));
        },
    },
    Case {
        name: "the first sends what is no layer",
        liar: Half::Decompress,
        lie: |session, mut files| {
            files[1].write_all(&[0; 1024]).unwrap();
            say(session, Done::Decompressed);
        },
        check: |pulled| pulled.refused(ErrorKind::Corrupt, victim().diff_id.as_str()),
    },
    Case {
        name: "the first sends without end",
        liar: Half::Decompress,
        lie: |_, mut files| while files[1].write_all(&[0; BLOCK]).is_ok() {},
        check: |pulled| pulled.refused(ErrorKind::ResourceExhausted, "larger than 1048576 bytes"),
    },
    Case {
        name: "the first keeps silent",
        liar: Half::Decompress,
        lie: |_, _| {},
        check: |pulled| {
            pulled.refused(
                ErrorKind::Internal,
                "(decompress) ended with exit status: 0",
            )
        },
    },
    Case {
        name: "the second has an image for another layer",
        liar: Half::Write,
        lie: |session, mut files| {
            files[0].read_to_end(&mut Vec::new()).unwrap();
            session.uuid().unwrap();
            files[1].write_all(&[b'e'; BLOCK]).unwrap();
            say(session, written(BLOCK));
        },
        check: |pulled| pulled.refused(ErrorKind::Corrupt, victim().diff_id.as_str()),
    },
    Case {
        name: "the second tells another length",
        liar: Half::Write,
        lie: |session, mut files| {
            files[0].read_to_end(&mut Vec::new()).unwrap();
            files[1].write_all(&[b'e'; BLOCK]).unwrap();
            say(session, written(2 * BLOCK));
        },
        check: |pulled| pulled.refused(ErrorKind::Internal, "4096 bytes is said to have 8192"),
    },
    Case {
        name: "the second is done too soon",
        liar: Half::Write,
        lie: |session, files| {
            drop(files);
            say(session, written(BLOCK));
        },
        check: |pulled| pulled.refused(ErrorKind::Internal, "before the archive's end"),
    },
    Case {
        name: "the second says that it restored directories",
        liar: Half::Write,
        lie: |session, mut files| {
            files[0].read_to_end(&mut Vec::new()).unwrap();
            say(session, Done::Directories(None));
        },
        check: |pulled| pulled.refused(ErrorKind::Internal, "out of turn"),
    },
    Case {
        name: "the second goes on when it is done",
        liar: Half::Write,
        lie: |session, mut files| {
            files[0].read_to_end(&mut Vec::new()).unwrap();
            files[1].write_all(&[b'e'; BLOCK]).unwrap();
            say(session, written(BLOCK));
            loop {
                std::hint::spin_loop();
            }
        },
        // Before its image stands anywhere.
        check: |pulled| assert!(unpackers(pulled.digest.as_str()).is_empty()),
    },
];

fn say(session: &Session, done: Done) {
    session.say(&Word::Done(done)).unwrap();
}

fn written(len: usize) -> Done {
    Done::Written(Written {
        erofs_len: len as u64,
        entries: 1,
        dropped_xattrs: 0,
        opaque_root: false,
    })
}

/// Whose name the others would like to have.
fn victim() -> Layer {
    Layer::new(Packing::Plain, &[("bin/sh", b"#!")])
}

/// The layer of a case: its own, with more in it than a pipe holds.
fn attacker(case: &Case) -> Layer {
    let rest = noise(LIMIT as usize / 2, 1);
    Layer::new(Packing::Plain, &[(case.name, b""), ("rest", &rest)])
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [task, name] = &arguments[..]
        && ["decompress", "write", "directories"].contains(&task.as_str())
    {
        return unpack(task, name);
    }
    // What cargo passes to every test: options, and parts of names.
    let mut parts = arguments;
    parts.retain(|argument| !argument.starts_with('-'));
    let wanted = |name: &str| parts.is_empty() || parts.iter().any(|part| name.contains(part));
    for case in CASES.iter().filter(|case| wanted(case.name)) {
        println!("{}", case.name);
        let layer = attacker(case);
        let claimed = vec![victim().diff_id.to_string()];
        let image = TestImage::with(vec![layer], claimed, host_arch(), OCI_MANIFEST);
        let taken_over = Unpacker {
            program: std::env::current_exe().unwrap(),
            ..unpacker()
        };
        (case.check)(&pull(&image, taken_over));
    }
    ExitCode::SUCCESS
}

/// Pulls an image of one layer.
fn pull(image: &TestImage, unpacker: Unpacker) -> Pulled {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let root = tempfile::tempdir().unwrap();
    let result = runtime.block_on(pull_to(root.path(), image, unpacker));
    Pulled {
        result,
        root,
        digest: image.layers[0].digest(),
    }
}

async fn pull_to(
    root: &Path,
    image: &TestImage,
    unpacker: Unpacker,
) -> Result<imagesvc::PulledImage, Error> {
    let server = {
        let image = image.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let config = ImageServiceConfig {
        max_layer_bytes: LIMIT,
        ..ImageServiceConfig::default()
    };
    let service = ImageService::open(config, root, unpacker, Arc::new(())).await?;
    service.pull(&format!("{}/app", server.host()), None).await
}

/// In the place of `drupe-unpacker`: an honest one, unless this half lies.
fn unpack(task: &str, name: &str) -> ExitCode {
    let half = match task {
        "decompress" => Half::Decompress,
        _ => Half::Write,
    };
    let by_digest: BTreeMap<String, &Case> = CASES
        .iter()
        .map(|case| (attacker(case).digest().to_string(), case))
        .collect();
    let case = by_digest[name];
    if case.liar != half {
        return drupe_unpacker::run();
    }
    let (session, _, fds) = Session::open().unwrap();
    let files = fds.into_iter().map(File::from).collect();
    session
        .say(&Word::Ready {
            missing: Vec::new(),
        })
        .unwrap();
    (case.lie)(&session, files);
    ExitCode::SUCCESS
}
