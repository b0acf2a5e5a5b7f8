//! Who a container's processes are: users, groups, capabilities.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use e2e::eventually;

use crate::{shares_the_hosts_kernel, with_drupe, with_node};

#[test]
fn a_container_runs_as_the_user_and_groups_it_names() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("users")?;
        let id = |name: &str, context: LinuxContainerSecurityContext| -> Result<String> {
            let mut config = pod.container_config(name, &["id"]);
            let linux = config.linux.get_or_insert_default();
            let namespace_options = linux
                .security_context
                .take()
                .unwrap_or_default()
                .namespace_options;
            linux.security_context = Some(LinuxContainerSecurityContext {
                namespace_options,
                ..context
            });
            let container = pod.start_with(config)?;
            container.wait_exit()?;
            Ok(container.output()?.trim().to_owned())
        };
        let number = |value| Some(Int64Value { value });
        let by_name = LinuxContainerSecurityContext {
            run_as_username: "alice".to_owned(),
            ..Default::default()
        };
        let printed = id("name", by_name)?;
        ensure!(
            printed.starts_with("uid=1000(alice) gid=1000(alice) ")
                && printed.contains("50(staff)"),
            "{printed}"
        );
        let by_number = LinuxContainerSecurityContext {
            run_as_user: number(1234),
            run_as_group: number(2345),
            supplemental_groups: vec![29, 3456],
            ..Default::default()
        };
        let printed = id("number", by_number)?;
        ensure!(printed.starts_with("uid=1234 gid=2345 "), "{printed}");
        ensure!(
            printed.contains("29(audio)") && printed.contains("3456"),
            "{printed}"
        );
        Ok(())
    })
}

#[test]
fn the_images_user_is_used_when_none_is_named() -> Result<()> {
    with_node(|node| {
        let mut image = e2e::image::busybox()?;
        image.config["User"] = serde_json::json!("alice:audio");
        node.registry()?.push("alice", "latest", &image)?;
        let name = "127.0.0.1:5000/alice:latest";
        node.cri()?.pull(name)?;
        let pod = node.run_pod("image-user")?;
        let mut config = pod.container_config("c", e2e::pod::IDLE);
        config.image.get_or_insert_default().image = name.to_owned();
        let container = pod.start_with(config)?;
        assert_eq!(container.exec(&["id", "-u"])?, "1000");
        assert_eq!(container.exec(&["id", "-g"])?, "29");
        assert_eq!(
            container.exec(&["cat", "/home/alice/greeting"])?,
            "hello from alice"
        );
        Ok(())
    })
}

#[test]
fn strict_groups_are_those_of_the_request_alone() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("groups")?;
        let groups = |name: &str, policy: SupplementalGroupsPolicy| -> Result<String> {
            let mut config = pod.container_config(name, e2e::pod::IDLE);
            let context = e2e::pod::security(&mut config);
            context.run_as_user = Some(Int64Value { value: 1000 });
            context.supplemental_groups = vec![3456];
            context.supplemental_groups_policy = policy.into();
            let container = pod.start_with(config)?;
            let mut shown: Vec<i64> = container
                .status()?
                .user
                .and_then(|user| user.linux)
                .context("no user in the status")?
                .supplemental_groups;
            shown.sort_unstable();
            let inside = container.exec(&["grep", "^Groups:", "/proc/1/status"])?;
            let inside: Vec<i64> = inside
                .split_whitespace()
                .skip(1)
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            assert_eq!(shown, inside, "{name}");
            Ok(format!("{inside:?}"))
        };
        // The image says that the user is of group 50.
        let merged = groups("merge", SupplementalGroupsPolicy::Merge)?;
        ensure!(
            merged.contains("50, ") && merged.contains("3456"),
            "{merged}"
        );
        let strict = groups("strict", SupplementalGroupsPolicy::Strict)?;
        ensure!(
            !strict.contains("50, ") && strict.contains("3456"),
            "{strict}"
        );
        Ok(())
    })
}

#[test]
fn a_user_may_serve_low_ports_and_have_as_many_processes_as_root() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("user")?;
        let command = ["httpd", "-f", "-p", "80", "-h", "/etc"];
        let mut config = pod.container_config("c", &command);
        e2e::pod::security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
        let container = pod.start_with(config)?;
        eventually("the server to answer", Duration::from_secs(10), || {
            container.exec(&[
                "wget",
                "-q",
                "-O",
                "/dev/null",
                "http://127.0.0.1:80/passwd",
            ])
        })?;
        let ping = "/proc/sys/net/ipv4/ping_group_range";
        assert_eq!(container.exec(&["cat", ping])?, "0\t2147483647");
        let limits = container.exec(&["cat", "/proc/self/limits"])?;
        let processes = limits
            .lines()
            .find(|line| line.starts_with("Max processes"));
        let words: Vec<_> = processes.unwrap_or_default().split_whitespace().collect();
        assert_eq!(words[2..4], ["unlimited", "unlimited"], "{limits}");
        Ok(())
    })
}

#[test]
fn a_container_has_the_capabilities_it_was_left_with() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("caps")?;
        let effective =
            |name: &str, capability: Option<Capability>, privileged: bool| -> Result<u64> {
                let mut config = pod.container_config(name, e2e::pod::IDLE);
                let context = e2e::pod::security(&mut config);
                context.capabilities = capability;
                context.privileged = privileged;
                let container = pod.start_with(config)?;
                let status = container.exec(&["grep", "CapEff", "/proc/1/status"])?;
                Ok(u64::from_str_radix(
                    status.trim_start_matches("CapEff:").trim(),
                    16,
                )?)
            };
        const NET_ADMIN: u64 = 1 << 12;
        const SYS_ADMIN: u64 = 1 << 21;
        const CHOWN: u64 = 1;
        let add = Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned()],
            ..Default::default()
        };
        let drop = Capability {
            drop_capabilities: vec!["ALL".to_owned()],
            ..Default::default()
        };
        let default = effective("default", None, false)?;
        ensure!(
            default & CHOWN != 0 && default & (NET_ADMIN | SYS_ADMIN) == 0,
            "{default:x}"
        );
        ensure!(effective("added", Some(add), false)? & NET_ADMIN != 0);
        assert_eq!(effective("dropped", Some(drop), false)?, 0);
        if !shares_the_hosts_kernel(node) {
            ensure!(effective("privileged", None, true)? & SYS_ADMIN != 0);
        }
        Ok(())
    })
}
