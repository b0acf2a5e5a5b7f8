//! What the CDI devices of one container change, together, and the part of it
//! that is a change of what the container asks for.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use super::CdiError;
use super::apply::Extras;
use super::file::{ContainerEdits, DeviceNode, Hook, IntelRdt, Mount, NetDevice};
use crate::devices::{Access, Ask, Kind, Stated};
use crate::spec::{self, ContainerSpec, Propagation};

/// Options of a bind mount that the OCI spec takes as they are.
const FLAGS: [&str; 14] = [
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "relatime",
    "strictatime",
    "nodiratime",
    "nosymfollow",
    "async",
    "nolazytime",
    "defaults",
];

/// In the order of the devices, each with the device that it is of.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    pub env: Vec<(String, String)>,
    nodes: Vec<(String, DeviceNode)>,
    mounts: Vec<(String, Mount)>,
    hooks: Vec<(String, Hook)>,
    rdt: Option<(String, IntelRdt)>,
    net: Vec<(String, NetDevice)>,
    gids: Vec<u32>,
}

impl Edits {
    pub fn append(&mut self, device: &str, edits: &ContainerEdits) {
        fn with<T: Clone>(device: &str, all: &[T]) -> Vec<(String, T)> {
            all.iter()
                .map(|one| (device.to_owned(), one.clone()))
                .collect()
        }
        let variables = edits.env.iter().filter_map(|text| text.split_once('='));
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        self.env.extend(variables);
        self.nodes.extend(with(device, &edits.device_nodes));
        self.mounts.extend(with(device, &edits.mounts));
        self.hooks.extend(with(device, &edits.hooks));
        self.net.extend(with(device, &edits.net_devices));
        if let Some(rdt) = &edits.intel_rdt {
            self.rdt = Some((device.to_owned(), rdt.clone()));
        }
        // 0 is what a file says that means none.
        let gids = edits.additional_gids.iter().filter(|&&gid| gid != 0);
        self.gids.extend(gids);
    }

    /// Makes `spec` ask for what it can; the devices that it is to have
    /// besides, and what is only for its OCI spec. Looks at the node's files.
    pub fn change(
        self,
        spec: &mut ContainerSpec,
        on_host: bool,
    ) -> Result<(Vec<Ask>, Extras), CdiError> {
        if !on_host {
            self.check_for_guest()?;
        }
        let mut extras = Extras::default();
        spec.env.extend(self.env);
        for gid in self.gids.into_iter().map(i64::from) {
            if !spec.user.supplemental_groups.contains(&gid) {
                spec.user.supplemental_groups.push(gid);
            }
        }
        for (device, mount) in self.mounts {
            if mount.is_bind() {
                let (volume, flags) = mount.volume(&device, on_host)?;
                spec.mounts
                    .retain(|other| other.container_path != volume.container_path);
                extras.flags.insert(volume.container_path.clone(), flags);
                spec.mounts.push(volume);
            } else {
                extras.mounts.push(mount);
            }
        }
        for (device, hook) in &self.hooks {
            if hook.path.as_os_str().is_empty() {
                let what = format!("a {} hook without a path", hook.hook_name.as_str());
                return Err(unsupported(device, what));
            }
        }
        extras.hooks = self.hooks.into_iter().map(|(_, hook)| hook).collect();
        if let Some((device, _)) = self.net.first() {
            // The containers of a pod have its network, not one of their own.
            return Err(unsupported(
                device,
                "moving network interfaces (netDevices)",
            ));
        }
        if let Some((device, rdt)) = self.rdt {
            if rdt.enable_cmt || rdt.enable_mbm {
                return Err(unsupported(&device, "intelRdt.enableCMT or enableMBM"));
            }
            extras.rdt = Some(rdt);
        }
        let asks = self
            .nodes
            .into_iter()
            .map(|(device, node)| node.ask(&device));
        Ok((asks.collect(), extras))
    }

    /// What is of the node's kernel or its programs.
    fn check_for_guest(&self) -> Result<(), CdiError> {
        if let Some((device, hook)) = self.hooks.first() {
            return Err(CdiError::HookInGuest {
                device: device.clone(),
                hook: hook.hook_name.as_str(),
                path: hook.path.clone(),
            });
        }
        let refuse = |device: &String, what: String| {
            Err(CdiError::NotInGuest {
                device: device.clone(),
                what,
            })
        };
        if let Some((device, _)) = &self.rdt {
            return refuse(device, "intelRdt".to_owned());
        }
        if let Some((device, net)) = self.net.first() {
            return refuse(device, format!("interface {:?}", net.host_interface_name));
        }
        let of_node = |(_, mount): &&(String, Mount)| !mount.is_bind() && mount.kind != "tmpfs";
        if let Some((device, mount)) = self.mounts.iter().find(of_node) {
            let what = format!(
                "mount of type {:?} at {:?}",
                mount.kind, mount.container_path
            );
            return refuse(device, what);
        }
        Ok(())
    }
}

fn unsupported(device: &str, what: impl Into<String>) -> CdiError {
    CdiError::Unsupported {
        device: device.to_owned(),
        what: what.into(),
    }
}

impl DeviceNode {
    fn ask(self, device: &str) -> Ask {
        let kind = match self.kind.as_deref() {
            Some("b") => Some(Kind::Block),
            Some("c" | "u") => Some(Kind::Character),
            Some("p") => Some(Kind::Fifo),
            _ => None,
        };
        let number = match (kind, self.major, self.minor) {
            (Some(Kind::Fifo), ..) => Some((0, 0)),
            // No device has major number 0.
            (_, Some(major), minor) if major != 0 => Some((major, minor.unwrap_or(0))),
            _ => None,
        };
        Ask {
            field: format!("CDI device {device}: deviceNodes[{}]", self.path.display()),
            host_path: self.host_path.unwrap_or_else(|| self.path.clone()),
            container_path: self.path,
            access: self.permissions.unwrap_or(Access::ALL),
            stated: Some(Stated {
                kind,
                number,
                mode: self.file_mode,
                uid: self.uid,
                gid: self.gid,
            }),
        }
    }
}

impl Mount {
    fn is_bind(&self) -> bool {
        matches!(self.kind.as_str(), "" | "none" | "bind" | "rbind")
    }

    /// The mount as CRI would ask for it, and the options that CRI has no word
    /// for.
    fn volume(self, device: &str, on_host: bool) -> Result<(spec::Mount, Vec<String>), CdiError> {
        let failed = |path: &PathBuf, source| CdiError::MountSource {
            device: device.to_owned(),
            path: path.clone(),
            source,
        };
        fs::metadata(&self.host_path).map_err(|source| failed(&self.host_path, source))?;
        let mut volume = spec::Mount {
            host_path: self.host_path,
            container_path: self.container_path,
            read_only: false,
            recursive_read_only: false,
            propagation: Propagation::Private,
            id_mapping: None,
            image: None,
        };
        let mut flags = Vec::new();
        for option in self.options {
            match option.as_str() {
                "bind" | "rbind" => {}
                "rw" => volume.read_only = false,
                "ro" => volume.read_only = true,
                "rro" => (volume.read_only, volume.recursive_read_only) = (true, true),
                "private" | "rprivate" => volume.propagation = Propagation::Private,
                "slave" | "rslave" => volume.propagation = Propagation::HostToContainer,
                "shared" | "rshared" => volume.propagation = Propagation::Bidirectional,
                known if on_host || FLAGS.contains(&known) => flags.push(option),
                unknown => {
                    let at = volume.container_path.display();
                    let what = format!("option {unknown:?} of the mount at {at}");
                    return Err(unsupported(device, what));
                }
            }
        }
        Ok((volume, flags))
    }
}

/// Options by the mount's place in the container.
pub(super) type Flags = BTreeMap<PathBuf, Vec<String>>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::tests::container;

    fn edits(yaml: &str) -> Edits {
        let mut edits = Edits::default();
        edits.append("v/c=x", &serde_norway::from_str(yaml).unwrap());
        edits
    }

    #[test]
    fn a_container_asks_for_what_its_devices_say() {
        let mut spec = container();
        spec.env = vec![("A".into(), "1".into())];
        spec.user.supplemental_groups = vec![5];
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().display();
        let text = format!(
            "env: [A=2]\nadditionalGids: [0, 5, 6]\n\
             deviceNodes: [{{path: /dev/y, hostPath: /dev/x, type: c}}]\n\
             mounts: [{{hostPath: {source}, containerPath: /v, options: [ro, nosuid, rslave, bind]}}]"
        );
        let (asks, extras) = edits(&text).change(&mut spec, false).unwrap();
        assert_eq!(spec.env.last().unwrap(), &("A".to_owned(), "2".to_owned()));
        assert_eq!(spec.user.supplemental_groups, [5, 6]);
        let volume = &spec.mounts[0];
        assert!(volume.read_only);
        assert_eq!(volume.propagation, Propagation::HostToContainer);
        assert_eq!(extras.flags[&volume.container_path], ["nosuid"]);
        assert_eq!(asks[0].host_path, PathBuf::from("/dev/x"));
        assert_eq!(asks[0].field, "CDI device v/c=x: deviceNodes[/dev/y]");
        let stated = asks[0].stated.unwrap();
        assert_eq!((stated.kind, stated.number), (Some(Kind::Character), None));
    }

    #[test]
    fn what_the_nodes_kernel_does_is_refused_to_a_guest_by_device_and_what() {
        for (text, parts) in [
            (
                "hooks: [{hookName: createContainer, path: /usr/bin/h}]",
                ["createContainer", "/usr/bin/h"],
            ),
            ("intelRdt: {closID: a}", ["intelRdt", "host"]),
            (
                "netDevices: [{hostInterfaceName: eth5, name: n}]",
                ["eth5", "host"],
            ),
            (
                "mounts: [{hostPath: proc, containerPath: /p, type: proc}]",
                ["proc", "/p"],
            ),
        ] {
            let error = edits(text).change(&mut container(), false).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::FailedPrecondition);
            let error = error.to_string();
            assert!(error.contains("CDI device v/c=x"), "{error}");
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn a_mount_of_nothing_names_the_device() {
        let text = "mounts: [{hostPath: /no/such, containerPath: /v}]";
        let error = edits(text).change(&mut container(), true).unwrap_err();
        assert!(error.to_string().contains("v/c=x"), "{error}");
    }
}
