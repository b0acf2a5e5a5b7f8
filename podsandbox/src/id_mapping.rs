//! Whether the ids a container asks for are its pod's.
//!
//! All containers of a pod share its user namespace, and the shared directory
//! with the pod's volumes is served with that one mapping of ids. So there is
//! one for everything, and the kubelet asks for no other.

use crate::spec::{ContainerSpec, IdMapping};
use crate::{Error, Result};

/// Fails with the field of `spec` that does not fit a pod with this mapping.
pub(crate) fn check(pod: Option<IdMapping>, spec: &ContainerSpec) -> Result<()> {
    let refuse = |field: String, asked: Option<IdMapping>| {
        let words = |mapping: Option<IdMapping>| match mapping {
            None => "no mapping of ids".to_owned(),
            Some(IdMapping { host_id, length }) => {
                format!("ids 0 to {} as {host_id} and on", length.saturating_sub(1))
            }
        };
        Err(Error::Invalid {
            field,
            why: format!(
                "asks for {}, but the pod has {}; all of a pod's containers and mounts have the pod's",
                words(asked),
                words(pod)
            ),
        })
    };
    if spec.user_namespace != pod {
        let field = "config.linux.security_context.namespace_options.userns_options";
        return refuse(field.to_owned(), spec.user_namespace);
    }
    let other = spec.mounts.iter().find(|mount| mount.id_mapping != pod);
    match other {
        None => Ok(()),
        Some(mount) => {
            let path = mount.container_path.display();
            refuse(
                format!("config.mounts[{path}].uid_mappings"),
                mount.id_mapping,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Mount, Propagation};

    const POD: Option<IdMapping> = Some(IdMapping {
        host_id: 65_536,
        length: 65_536,
    });
    const OTHER: Option<IdMapping> = Some(IdMapping {
        host_id: 0,
        length: 65_536,
    });

    fn container(ids: Option<IdMapping>, mounts: &[Option<IdMapping>]) -> ContainerSpec {
        let mount = |ids: &Option<IdMapping>| Mount {
            host_path: "/h".into(),
            container_path: "/v".into(),
            read_only: false,
            recursive_read_only: false,
            propagation: Propagation::Private,
            id_mapping: *ids,
            image: None,
        };
        ContainerSpec {
            user_namespace: ids,
            mounts: mounts.iter().map(mount).collect(),
            ..crate::oci::tests::container()
        }
    }

    #[test]
    fn what_has_the_pods_mapping_is_fine() {
        check(None, &container(None, &[None])).unwrap();
        check(POD, &container(POD, &[POD, POD])).unwrap();
    }

    #[test]
    fn what_has_another_is_named() {
        let field = |pod, spec: &ContainerSpec| match check(pod, spec).unwrap_err() {
            Error::Invalid { field, .. } => field,
            other => panic!("{other}"),
        };
        let own = "config.linux.security_context.namespace_options.userns_options";
        for (pod, ids) in [(None, POD), (POD, None), (POD, OTHER)] {
            assert_eq!(field(pod, &container(ids, &[])), own);
        }
        let mount = "config.mounts[/v].uid_mappings";
        for (pod, ids) in [(None, POD), (POD, None), (POD, OTHER)] {
            assert_eq!(field(pod, &container(pod, &[pod, ids])), mount);
        }
    }
}
