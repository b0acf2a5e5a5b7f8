//! A container's devices: of the node, and of vendors by CDI.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use cri_api::v1;
use podsandbox::cdi;
use podsandbox::devices::Device;
use tonic::Status;

use super::invalid;

/// More than a container can use; directories count once here.
const MAX_DEVICES: usize = 1024;

pub fn parse(devices: Vec<v1::Device>) -> Result<Vec<Device>, Status> {
    if devices.len() > MAX_DEVICES {
        let why = format_args!("{} are more than {MAX_DEVICES}", devices.len());
        return Err(invalid("config.devices", why));
    }
    devices.into_iter().map(device).collect()
}

fn device(device: v1::Device) -> Result<Device, Status> {
    // As the field's runtimes: the same path, where none is stated.
    let container_path = match device.container_path.as_str() {
        "" => &device.host_path,
        stated => stated,
    };
    let field = |name: &str| format!("config.devices[{container_path}].{name}");
    for (name, path) in [
        ("host_path", device.host_path.as_str()),
        ("container_path", container_path),
    ] {
        if !is_plain(Path::new(path)) {
            let why = format_args!("{path:?} is not an absolute path without '..'");
            return Err(invalid(&field(name), why));
        }
    }
    let access = device.permissions.parse();
    Ok(Device {
        access: access.map_err(|error| invalid(&field("permissions"), error))?,
        container_path: PathBuf::from(container_path),
        host_path: PathBuf::from(&device.host_path),
    })
}

fn is_plain(path: &Path) -> bool {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute()
        && path.components().count() > 1
        && path.components().all(plain)
        && !path.as_os_str().as_encoded_bytes().contains(&0)
}

/// The names in CRI's field and in annotations, each once.
pub fn parse_cdi(
    devices: &[v1::CdiDevice],
    annotations: &BTreeMap<String, String>,
) -> Result<Vec<String>, Status> {
    let names = devices.iter().map(|device| device.name.as_str());
    let of_field = cdi::requested(names, &BTreeMap::new());
    let of_field = of_field.map_err(|error| invalid("config.CDI_devices", error))?;
    let of_field: Vec<String> = of_field.iter().map(ToString::to_string).collect();
    let all = cdi::requested(of_field.iter().map(String::as_str), annotations);
    let field = format!("config.annotations[{}*]", cdi::ANNOTATION_PREFIX);
    let all = all.map_err(|error| invalid(&field, error))?;
    Ok(all.iter().map(ToString::to_string).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(host: &str, container: &str, permissions: &str) -> v1::Device {
        v1::Device {
            host_path: host.into(),
            container_path: container.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn a_device_is_taken_as_the_kubelet_states_it() {
        let taken = device(asked("/dev/sdb", "/dev/block", "mrw")).unwrap();
        assert_eq!(taken.container_path, Path::new("/dev/block"));
        assert_eq!(taken.access.to_string(), "rwm");
        let same = device(asked("/dev/fuse", "", "rw")).unwrap();
        assert_eq!(same.container_path, Path::new("/dev/fuse"));
    }

    #[test]
    fn a_device_that_cannot_be_is_refused_by_its_field() {
        for (device, field) in [
            (asked("", "/dev/x", "r"), "host_path"),
            (asked("dev/x", "/dev/x", "r"), "host_path"),
            (asked("/dev/x", "/dev/../etc/x", "r"), "container_path"),
            (asked("/dev/x", "/", "r"), "container_path"),
            (asked("/dev/x", "/dev/x", ""), "permissions"),
            (asked("/dev/x", "/dev/x", "rwx"), "permissions"),
        ] {
            let refused = parse(vec![device]).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            let message = refused.message();
            assert!(message.starts_with("config.devices["), "{message}");
            assert!(message.contains(&format!("].{field}: ")), "{message}");
        }
        let many = vec![asked("/dev/null", "", "r"); MAX_DEVICES + 1];
        assert!(parse(many).is_err());
    }

    #[test]
    fn cdi_devices_come_by_field_and_annotation() {
        let of_field = |name: &str| vec![v1::CdiDevice { name: name.into() }];
        let annotation = |value: &str| {
            BTreeMap::from([
                ("cdi.k8s.io/plugin".to_owned(), value.to_owned()),
                ("vendor.com/other".to_owned(), "=".to_owned()),
            ])
        };
        assert_eq!(
            parse_cdi(&of_field("v/c=a"), &annotation("v/c=b,v/c=a")).unwrap(),
            ["v/c=a", "v/c=b"]
        );
        for (result, field) in [
            (
                parse_cdi(&of_field("nothing"), &BTreeMap::new()),
                "config.CDI_devices: ",
            ),
            (
                parse_cdi(&[], &annotation("v/c")),
                "config.annotations[cdi.k8s.io/*]: ",
            ),
            (
                parse_cdi(&[], &annotation("")),
                "config.annotations[cdi.k8s.io/*]: ",
            ),
        ] {
            let refused = result.unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            assert!(refused.message().starts_with(field), "{refused:?}");
        }
    }
}
