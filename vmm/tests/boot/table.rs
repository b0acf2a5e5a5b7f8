//! The table in docs/security.md of what the processes of a pod have, held to a
//! pod that runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use drupe_vmm::filter::{self, List, Role, uml};
use vmm_client::UmlMode;

use crate::common::{is_file_server, is_kvm, kernel, namespace_of};
use crate::takeover::running;

const PAGE: &str = include_str!("../../../docs/security.md");

#[tokio::test]
async fn the_table_in_the_docs_is_what_is_measured() {
    let Some(kernel) = kernel() else { return };
    let pod = running(&kernel).await;
    let monitor = PathBuf::from(format!("/proc/{}", pod.process.pid()));
    let (mut files, mut guest) = (None, None);
    for process in namespace_of(pod.process.pid()) {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        if is_file_server(&process) {
            files = Some(process);
        } else if process != monitor && name.trim() != "uml-userspace" {
            guest = Some(process);
        }
    }
    let mut rows = vec![row("monitor", &calls_of_the_monitor(), &monitor)];
    for role in Role::ALL {
        if role != Role::FileServer && (role != Role::Vcpu || is_kvm()) {
            rows.push(format!(
                "| its thread `{}` | {} | | |",
                role.name(),
                calls(&filter::of(role))
            ));
        }
    }
    let files = files.expect("a file server");
    rows.push(row(
        "file server",
        &calls(&filter::of(Role::FileServer)),
        &files,
    ));
    if !is_kvm() {
        let guest = guest.expect("a guest's kernel");
        let of_mode = |mode| calls(&uml::sealed(mode));
        let (seccomp, ptrace) = (of_mode(UmlMode::Seccomp), of_mode(UmlMode::Ptrace));
        // It has a descriptor for each address space, which come and go.
        let guests = row("guest's kernel, `seccomp`", &seccomp, &guest);
        let (guests, _) = guests.trim_end_matches(" |").rsplit_once(' ').unwrap();
        rows.push(format!("{guests} |"));
        rows.push(format!("| guest's kernel, `ptrace` | {ptrace} | | |"));
    }
    let measured = rows.join("\n");
    println!("{measured}");
    assert!(
        PAGE.contains(&measured),
        "docs/security.md does not have\n{measured}"
    );
}

/// How many are open, and how many of them for some arguments only.
fn calls(list: &List) -> String {
    format!("{} | {}", list.open().count(), list.open_for_some())
}

/// Those that one of its threads has at least.
fn calls_of_the_monitor() -> String {
    let roles = Role::ALL
        .into_iter()
        .filter(|role| *role != Role::FileServer);
    let open: BTreeSet<_> = roles
        .flat_map(|role| filter::of(role).open().collect::<Vec<_>>())
        .collect();
    format!("{} |", open.len())
}

fn row(name: &str, calls: &str, process: &Path) -> String {
    let status = fs::read_to_string(process.join("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    let capabilities = |set: &str| u64::from_str_radix(&field(set), 16).unwrap().count_ones();
    let sets = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].map(capabilities);
    assert_eq!(sets[4], 0);
    let most = sets.into_iter().max().unwrap();
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    let descriptors = fs::read_dir(process.join("fd")).unwrap().count();
    format!("| {name} | {calls} | {most} | {descriptors} |")
}
