//! Devices of a container on the host's kernel: device files and control group
//! rules of its OCI spec (runtime spec 1.2, "Devices").

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    Spec,
};

use super::{Kind, Node};
use crate::Result;

/// Whom a device is to belong to that nothing is said of: the container's user,
/// as far as it is a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Owner {
    pub fn new(user: &agent_api::User) -> Self {
        let number = |id: Option<i64>, name: &str| {
            let id = id.and_then(|id| u32::try_from(id).ok());
            id.or_else(|| name.parse().ok()).filter(|&id| id != 0)
        };
        Self {
            uid: number(user.uid, &user.username),
            gid: number(user.gid, &user.groupname),
        }
    }

    pub fn of(self, node: &Node) -> (Option<u32>, Option<u32>) {
        let of_user = if node.of_user { self } else { Self::default() };
        (node.uid.or(of_user.uid), node.gid.or(of_user.gid))
    }
}

/// Adds `nodes` to `spec`, in place of others at their paths.
pub fn add(spec: &mut Spec, nodes: &[Node], owner: Owner) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut devices = linux.devices().clone().unwrap_or_default();
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    devices.retain(|device| {
        nodes
            .iter()
            .all(|node| node.container_path != *device.path())
    });
    for node in nodes {
        devices.push(device(node, owner)?);
        if node.kind != Kind::Fifo {
            rules.push(rule(node)?);
        }
    }
    linux.set_devices(Some(devices));
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    Ok(())
}

fn typ(node: &Node) -> LinuxDeviceType {
    match node.kind {
        Kind::Block => LinuxDeviceType::B,
        Kind::Character | Kind::Guests => LinuxDeviceType::C,
        Kind::Fifo => LinuxDeviceType::P,
    }
}

fn device(node: &Node, owner: Owner) -> Result<LinuxDevice> {
    let mut builder = LinuxDeviceBuilder::default()
        .path(&node.container_path)
        .typ(typ(node))
        .major(i64::from(node.major))
        .minor(i64::from(node.minor));
    if let Some(mode) = node.mode {
        builder = builder.file_mode(mode);
    }
    let (uid, gid) = owner.of(node);
    if let Some(uid) = uid {
        builder = builder.uid(uid);
    }
    if let Some(gid) = gid {
        builder = builder.gid(gid);
    }
    Ok(builder.build()?)
}

fn rule(node: &Node) -> Result<LinuxDeviceCgroup> {
    Ok(LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(typ(node))
        .major(i64::from(node.major))
        .minor(i64::from(node.minor))
        .access(node.access.to_string())
        .build()?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::devices::Access;

    fn node(path: &str, minor: u32, of_user: bool) -> Node {
        Node {
            field: String::new(),
            host_path: path.into(),
            container_path: path.into(),
            access: Access {
                make: false,
                ..Access::ALL
            },
            kind: Kind::Character,
            major: 1,
            minor,
            mode: None,
            uid: None,
            gid: None,
            of_user,
        }
    }

    #[test]
    fn devices_are_added_with_rules_and_replace_those_at_their_paths() {
        let mut spec = Spec::default();
        let owner = Owner::default();
        add(
            &mut spec,
            &[node("/dev/a", 3, false), node("/dev/b", 5, false)],
            owner,
        )
        .unwrap();
        add(&mut spec, &[node("/dev/a", 7, false)], owner).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let devices = linux.devices().as_ref().unwrap();
        let shown: Vec<_> = devices
            .iter()
            .map(|d| (d.path().as_path(), d.minor()))
            .collect();
        assert_eq!(shown, [(Path::new("/dev/b"), 5), (Path::new("/dev/a"), 7)]);
        let rules = linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .as_ref()
            .unwrap();
        let last = rules.last().unwrap();
        assert!(last.allow());
        assert_eq!(
            (last.minor(), last.access().as_deref()),
            (Some(7), Some("rw"))
        );
    }

    #[test]
    fn a_cdi_device_without_an_owner_is_the_users() {
        let owner = Owner::new(&agent_api::User {
            username: "1000".into(),
            ..agent_api::User::default()
        });
        assert_eq!(owner.of(&node("/dev/a", 3, true)), (Some(1000), None));
        assert_eq!(owner.of(&node("/dev/a", 3, false)), (None, None));
        let named = Owner::new(&agent_api::User {
            username: "www".into(),
            gid: Some(0),
            ..agent_api::User::default()
        });
        assert_eq!(named, Owner::default());
    }
}
