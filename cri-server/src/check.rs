//! `drupe check`: what this node can do, what is missing, and the remedy.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use podsandbox::host::find_program;
use podsandbox::machine::NodeFacts;

use crate::config::Config;

enum Verdict {
    Good(String),
    /// Pods run without it.
    Note {
        found: String,
        remedy: String,
    },
    /// No pod can run.
    Bad {
        found: String,
        remedy: String,
    },
}

use Verdict::{Bad, Good, Note};

/// Prints one line a check; true if pods can run.
pub fn report(config: &Config) -> bool {
    let node = NodeFacts::read();
    let mut rows: Vec<(String, Verdict)> = vec![
        ("privileges".to_owned(), privileges()),
        ("kvm machine".to_owned(), kvm(&node)),
        (
            "vmm".to_owned(),
            program(&config.vmm, "install drupe's own files or set `vmm`"),
        ),
        (
            "unpacker".to_owned(),
            program(
                &config.unpacker,
                "install drupe's own files or set `unpacker`",
            ),
        ),
        ("mkfs.ext4".to_owned(), mkfs()),
        (
            "tap device".to_owned(),
            device("/dev/net/tun", "load the tun module: modprobe tun"),
        ),
    ];
    for (name, runtime) in &config.runtimes {
        if let Some(program) = &runtime.oci {
            rows.push((
                format!("handler {name}"),
                oci_runtime(name, program, config),
            ));
            continue;
        }
        let decision = runtime.decide(&node);
        let found = format!("{}: {}", decision.machine, decision.why);
        let machine = match (decision.usable, decision.remedy) {
            // What the node lacks is told above.
            (true, Some(remedy)) if node.kvm().is_ok() => Note { found, remedy },
            (true, _) => Good(found),
            (false, remedy) => Bad {
                found,
                remedy: remedy.unwrap_or_default(),
            },
        };
        rows.push((format!("handler {name}"), machine));
        if decision.usable {
            rows.push((
                format!("handler {name}: kernel"),
                Good(decision.kernel.display().to_string()),
            ));
        }
        rows.push((
            format!("handler {name}: initramfs"),
            readable(
                &runtime.initramfs,
                "build it with `make build` or set `initramfs`",
            ),
        ));
    }
    rows.push(("CNI plugins".to_owned(), plugins(config)));
    rows.push(("CNI configuration".to_owned(), cni(config)));

    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut usable = true;
    for (name, verdict) in &rows {
        let (mark, found, remedy) = match verdict {
            Good(found) => ("ok  ", found, None),
            Note { found, remedy } => ("note", found, Some(remedy)),
            Bad { found, remedy } => {
                usable = false;
                ("BAD ", found, Some(remedy))
            }
        };
        println!("{mark}  {name:width$}  {found}");
        if let Some(remedy) = remedy {
            println!("      {:width$}  → {remedy}", "");
        }
    }
    println!(
        "{}",
        if usable {
            "Pods can run on this node."
        } else {
            "Pods cannot run on this node yet."
        }
    );
    usable
}

fn privileges() -> Verdict {
    if nix::unistd::geteuid().is_root() {
        Good("root".to_owned())
    } else {
        Bad {
            found: "not root: namespaces, taps and mounts are out of reach".to_owned(),
            remedy: "run drupe as root or as a systemd service".to_owned(),
        }
    }
}

fn kvm(node: &NodeFacts) -> Verdict {
    match node.kvm() {
        Ok(found) => Good(found),
        Err((found, remedy)) => Note { found, remedy },
    }
}

fn program(path: &Path, remedy: &str) -> Verdict {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Good(path.display().to_string())
        }
        Ok(_) => Bad {
            found: format!("{} is not executable", path.display()),
            remedy: remedy.to_owned(),
        },
        Err(error) => Bad {
            found: format!("{}: {error}", path.display()),
            remedy: remedy.to_owned(),
        },
    }
}

/// Pods with a kernel of their own run without it.
fn oci_runtime(handler: &str, program: &Path, config: &Config) -> Verdict {
    let note = |found, remedy: String| Note { found, remedy };
    let Some(path) = find_program(program) else {
        let found = format!(
            "{} is not there: no pod can share the host's kernel",
            program.display()
        );
        let remedy = format!("install the package runc or crun, or set runtimes.{handler}.oci");
        return note(found, remedy);
    };
    if find_program(&config.shim).is_none() {
        let found = format!("{} is not there or not executable", config.shim.display());
        return note(found, "install drupe's own files or set `shim`".to_owned());
    }
    let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing: Vec<&str> = ["erofs", "overlay"]
        .into_iter()
        .filter(|kind| {
            !kinds
                .lines()
                .any(|line| line.trim_start_matches("nodev").trim() == *kind)
        })
        .collect();
    if missing.is_empty() {
        Good(format!("host's kernel by {}", path.display()))
    } else {
        let missing = missing.join(", ");
        let found = format!("{}; the kernel does not show {missing} yet", path.display());
        note(
            found,
            format!(
                "if it is a module it is loaded when needed; else pods on the host's kernel need a kernel with {missing}"
            ),
        )
    }
}

fn readable(path: &Path, remedy: &str) -> Verdict {
    match fs::File::open(path) {
        Ok(_) => Good(path.display().to_string()),
        Err(error) => Bad {
            found: format!("{}: {error}", path.display()),
            remedy: remedy.to_owned(),
        },
    }
}

fn device(path: &str, remedy: &str) -> Verdict {
    match fs::File::options().read(true).write(true).open(path) {
        Ok(_) => Good(path.to_owned()),
        Err(error) => Bad {
            found: format!("{path}: {error}"),
            remedy: remedy.to_owned(),
        },
    }
}

fn mkfs() -> Verdict {
    match Command::new("mkfs.ext4").arg("-V").output() {
        Ok(output) => Good(
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned(),
        ),
        Err(error) => Bad {
            found: format!("mkfs.ext4 does not run: {error}"),
            remedy: "install the package e2fsprogs".to_owned(),
        },
    }
}

fn plugins(config: &Config) -> Verdict {
    let dirs = &config.network.bin_dirs;
    let has = |name: &str| dirs.iter().any(|dir| dir.join(name).is_file());
    let missing: Vec<&str> = ["bridge", "host-local", "loopback", "portmap"]
        .into_iter()
        .filter(|name| !has(name))
        .collect();
    if missing.is_empty() {
        Good(format!("found in {dirs:?}"))
    } else {
        Note {
            found: format!("{} not found in {dirs:?}", missing.join(", ")),
            remedy: "install your network's plugins or the package containernetworking-plugins"
                .to_owned(),
        }
    }
}

fn cni(config: &Config) -> Verdict {
    match podsandbox::Network::probe(&config.network.conf_dir, &config.network.bin_dirs) {
        Ok(name) => Good(format!("network {name:?} in {:?}", config.network.conf_dir)),
        Err(reason) => Note {
            found: reason,
            remedy: "install a network plugin, or write a .conflist there; drupe notices"
                .to_owned(),
        },
    }
}
