//! `drupe check`: what this node can do, what is missing, and the remedy.

mod cache;
mod kernel;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use podsandbox::confinement::Facilities;
use podsandbox::host::find_program;
use podsandbox::machine::{Decision, Kept, NodeFacts};
use podsandbox::{Exempt, Network};

use crate::config::Config;
use crate::dirs::{self, DirError, Privacy};

enum Verdict {
    Good(String),
    /// It works, and could be better.
    Fair {
        found: String,
        remedy: String,
    },
    /// Pods run without it.
    Note {
        found: String,
        remedy: String,
    },
    /// No pod can run, or none of those that name no handler.
    Bad {
        found: String,
        remedy: String,
    },
}

use Verdict::{Bad, Fair, Good, Note};

impl Verdict {
    /// Pods that name no handler run without what only others need.
    fn of_handler(self, is_default: bool) -> Self {
        match self {
            Bad { found, remedy } if !is_default => Note {
                found: format!("no pod of this handler can run: {found}"),
                remedy,
            },
            verdict => verdict,
        }
    }
}

/// Prints one line a check; true if pods can run.
pub fn report(config: &Config) -> bool {
    let node = NodeFacts::read();
    let kept = Kept::read(&config.root);
    let mut rows: Vec<(String, Verdict)> = vec![
        ("privileges".to_owned(), privileges()),
        ("directories".to_owned(), directories(config)),
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
    let mut default_is = None;
    for (name, runtime) in &config.runtimes {
        if let Some(program) = &runtime.oci {
            rows.push((
                format!("handler {name}"),
                oci_runtime(name, program, config),
            ));
            continue;
        }
        let is_default = *name == config.default_runtime;
        let decision = runtime.decide(&node, &kept.of(name));
        let verdict = machine(&decision, &node).of_handler(is_default);
        if is_default {
            default_is = Some(decision.machine);
        }
        rows.push((format!("handler {name}"), verdict));
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
            )
            .of_handler(is_default),
        ));
    }
    rows.extend(kernel::rows(&Facilities::read(), config, default_is));
    if let Some(verdict) = cache::verdict(config) {
        rows.push(("private cache".to_owned(), verdict));
    }
    rows.push(("source check".to_owned(), source_check(config)));
    rows.push(("CNI plugins".to_owned(), plugins(config)));
    rows.push(("CNI configuration".to_owned(), cni(config)));

    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut usable = true;
    for (name, verdict) in &rows {
        let (mark, found, remedy) = match verdict {
            Good(found) => ("ok  ", found, None),
            Fair { found, remedy } => ("ok  ", found, Some(remedy)),
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

/// Those that are not there yet are made by the daemon.
fn directories(config: &Config) -> Verdict {
    let own = dirs::own(config).into_iter();
    for own in own.filter(|own| own.path.exists()) {
        match dirs::check(&own.path) {
            Ok(Privacy::Open { found, remedy }) if own.is_private => return Note { found, remedy },
            Ok(_) => {}
            Err(DirError::Foreign {
                path, why, remedy, ..
            }) => {
                let found = format!("{} {why}", path.display());
                return Bad { found, remedy };
            }
            Err(error) => {
                return Bad {
                    found: podsandbox::sentence(&error),
                    remedy: "configure others, or make them root's own".to_owned(),
                };
            }
        }
    }
    Good(format!("{:?} and {:?}", config.root, config.run_dir))
}

fn machine(decision: &Decision, node: &NodeFacts) -> Verdict {
    let found = format!("{}: {}", decision.machine, decision.why);
    let remedy = decision.remedy.clone();
    match (decision.usable, remedy) {
        // What the node lacks is told above.
        (true, Some(remedy)) if node.kvm().is_ok() => Fair { found, remedy },
        (true, _) => Good(found),
        (false, remedy) => Bad {
            found,
            remedy: remedy.unwrap_or_default(),
        },
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

/// Whether pods can be held to their addresses.
fn source_check(config: &Config) -> Verdict {
    let exempt = Exempt::new(&config.network.source_check_exempt);
    if exempt.all() {
        return Note {
            found: "off: pods may send from any MAC and IP address".to_owned(),
            remedy: "take \"*\" out of `network.source_check_exempt`".to_owned(),
        };
    }
    if !nix::unistd::geteuid().is_root() {
        return Note {
            found: "not tried: that takes root".to_owned(),
            remedy: "run drupe check as root".to_owned(),
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let tried = match runtime {
        Ok(runtime) => runtime.block_on(Network::try_source_check()),
        Err(error) => Err(error.to_string()),
    };
    match tried {
        Ok(()) => Good("pods are held to their MAC and IP addresses".to_owned()),
        Err(found) => Bad {
            found,
            remedy: "modprobe -a sch_ingress cls_bpf act_mirred; or do without: \
                     `network.source_check_exempt: [\"*\"]`"
                .to_owned(),
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
    match Network::probe(&config.network.conf_dir, &config.network.bin_dirs) {
        Ok(name) => Good(format!("network {name:?} in {:?}", config.network.conf_dir)),
        Err(reason) => Note {
            found: reason,
            remedy: "install a network plugin, or write a .conflist there; drupe notices"
                .to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use podsandbox::Machine;
    use podsandbox::machine::{Device, Had, Vendor};

    use super::*;

    fn decision(usable: bool, remedy: Option<&str>) -> Decision {
        Decision {
            machine: Machine::Kvm,
            kernel: "/kernel".into(),
            why: "it is so".to_owned(),
            remedy: remedy.map(str::to_owned),
            usable,
            withheld: false,
            had: Had::Nothing,
        }
    }

    #[test]
    fn only_the_default_handler_makes_a_node_bad() {
        let node = NodeFacts {
            extension: Some("vmx"),
            vendor: Vendor::Intel,
            is_virtual: false,
            device: Device::Opens,
        };
        let of = |usable, remedy, is_default| {
            machine(&decision(usable, remedy), &node).of_handler(is_default)
        };
        assert!(matches!(of(true, None, true), Good(_)));
        // What works is called so, or a node would not be labelled for it.
        assert!(matches!(of(true, Some("better"), false), Fair { .. }));
        assert!(matches!(of(false, Some("mend"), true), Bad { .. }));
        let Note { found, remedy } = of(false, Some("mend"), false) else {
            panic!("no note");
        };
        assert_eq!(remedy, "mend");
        assert!(found.contains("no pod of this handler can run"), "{found}");
        assert!(found.contains("kvm: it is so"), "{found}");
    }
}
