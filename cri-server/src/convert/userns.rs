//! User namespaces: `UserNamespace` and the `IDMapping`s of it and of mounts.

use cri_api::v1;
use podsandbox::spec::IdMapping;
use tonic::Status;

use super::invalid;

/// The user namespace of a pod and its containers; none is the guest's own, as
/// it is the node's for runtimes that share its kernel.
pub fn parse(
    field: &str,
    options: Option<&v1::UserNamespace>,
) -> Result<Option<IdMapping>, Status> {
    let Some(options) = options else {
        return Ok(None);
    };
    let (uids, gids) = (&options.uids, &options.gids);
    match options.mode() {
        v1::NamespaceMode::Pod => {
            for (name, ids) in [("uids", uids), ("gids", gids)] {
                if ids.is_empty() {
                    let why = "is empty, but mode POD needs one mapping";
                    return Err(invalid(&format!("{field}.{name}"), why));
                }
            }
            mapping(field, "uids", "gids", uids, gids)
        }
        v1::NamespaceMode::Node if uids.is_empty() && gids.is_empty() => Ok(None),
        v1::NamespaceMode::Node => Err(invalid(field, "mode NODE maps no ids")),
        mode => Err(invalid(
            &format!("{field}.mode"),
            format_args!("{} is none of POD and NODE", mode.as_str_name()),
        )),
    }
}

/// The ids of a mount; none where none are mapped.
pub fn of_mount(
    field: &str,
    uids: &[v1::IdMapping],
    gids: &[v1::IdMapping],
) -> Result<Option<IdMapping>, Status> {
    mapping(field, "uid_mappings", "gid_mappings", uids, gids)
}

fn mapping(
    field: &str,
    uid_name: &str,
    gid_name: &str,
    uids: &[v1::IdMapping],
    gids: &[v1::IdMapping],
) -> Result<Option<IdMapping>, Status> {
    let uid = one(&format!("{field}.{uid_name}"), uids)?;
    let gid = one(&format!("{field}.{gid_name}"), gids)?;
    if uid != gid {
        return Err(invalid(
            &format!("{field}.{gid_name}"),
            format_args!("differs from {uid_name}"),
        ));
    }
    Ok(uid)
}

fn one(field: &str, ids: &[v1::IdMapping]) -> Result<Option<IdMapping>, Status> {
    let mapping = match ids {
        [] => return Ok(None),
        [mapping] => mapping,
        more => {
            let why = format_args!("has {} mappings, one is supported", more.len()).to_string();
            return Err(invalid(field, why));
        }
    };
    let v1::IdMapping {
        host_id,
        container_id,
        length,
    } = *mapping;
    if container_id != 0 {
        return Err(invalid(
            field,
            format_args!("begins with id {container_id} of the container, not with 0"),
        ));
    }
    if length == 0 {
        return Err(invalid(field, "has length 0"));
    }
    // Linux takes the highest number for "no change"; the one below stands for
    // owners of files who are in no mapping.
    if host_id
        .checked_add(length)
        .is_none_or(|end| end > u32::MAX - 1)
    {
        return Err(invalid(
            field,
            format_args!("{length} ids from {host_id} on reach beyond the highest id"),
        ));
    }
    Ok(Some(IdMapping { host_id, length }))
}

pub fn show(mapping: IdMapping) -> Vec<v1::IdMapping> {
    vec![v1::IdMapping {
        host_id: mapping.host_id,
        container_id: 0,
        length: mapping.length,
    }]
}

pub fn show_namespace(mapping: IdMapping) -> v1::UserNamespace {
    v1::UserNamespace {
        mode: v1::NamespaceMode::Pod.into(),
        uids: show(mapping),
        gids: show(mapping),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(container_id: u32, host_id: u32, length: u32) -> v1::IdMapping {
        v1::IdMapping {
            host_id,
            container_id,
            length,
        }
    }

    fn namespace(
        mode: v1::NamespaceMode,
        uids: &[v1::IdMapping],
        gids: &[v1::IdMapping],
    ) -> Result<Option<IdMapping>, Status> {
        let options = v1::UserNamespace {
            mode: mode.into(),
            uids: uids.to_vec(),
            gids: gids.to_vec(),
        };
        parse("userns", Some(&options))
    }

    #[test]
    fn a_pods_mapping_is_kept_and_shown() {
        let given = [ids(0, 65_536, 65_536)];
        let mapping = namespace(v1::NamespaceMode::Pod, &given, &given)
            .unwrap()
            .unwrap();
        assert_eq!((mapping.host_id, mapping.length), (65_536, 65_536));
        let shown = show_namespace(mapping);
        assert_eq!(
            parse("userns", Some(&shown)).unwrap(),
            Some(mapping),
            "{shown:?}"
        );
        assert_eq!(of_mount("mount", &given, &given).unwrap(), Some(mapping));
    }

    #[test]
    fn without_a_namespace_of_its_own_a_pod_has_the_guests() {
        assert_eq!(parse("userns", None).unwrap(), None);
        assert_eq!(namespace(v1::NamespaceMode::Node, &[], &[]).unwrap(), None);
        assert_eq!(of_mount("mount", &[], &[]).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        use v1::NamespaceMode::{Container, Node, Pod, Target};
        let good = ids(0, 1000, 100_000);
        let cases: [(_, &[v1::IdMapping], &[v1::IdMapping], &str); 11] = [
            (Container, &[], &[], "userns.mode: CONTAINER is none"),
            (Target, &[], &[], "userns.mode: TARGET is none"),
            (Node, &[good], &[good], "userns: mode NODE"),
            (Pod, &[], &[good], "userns.uids: is empty"),
            (Pod, &[good], &[], "userns.gids: is empty"),
            (Pod, &[good, good], &[good], "userns.uids: has 2 mappings"),
            (Pod, &[good], &[good, good], "userns.gids: has 2 mappings"),
            (
                Pod,
                &[ids(1, 1000, 5)],
                &[good],
                "userns.uids: begins with id 1",
            ),
            (
                Pod,
                &[ids(0, 1000, 0)],
                &[good],
                "userns.uids: has length 0",
            ),
            (Pod, &[good], &[ids(0, 1000, 5)], "userns.gids: differs"),
            (
                Pod,
                &[ids(0, u32::MAX - 5, 5)],
                &[good],
                "userns.uids: 5 ids from",
            ),
        ];
        for (mode, uids, gids, why) in cases {
            let refused = namespace(mode, uids, gids).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            assert!(refused.message().starts_with(why), "{refused:?}");
        }
        let refused = of_mount("mount", &[good], &[]).unwrap_err();
        assert!(refused.message().starts_with("mount.gid_mappings: differs"));
    }
}
