//! Who a container's processes are and what they may do: from
//! `LinuxContainerSecurityContext`.

use std::path::PathBuf;

use cri_api::v1;
use podsandbox::spec::{Seccomp, Security, User};
use tonic::Status;

use super::{invalid, unsupported};

pub(super) fn user(context: &v1::LinuxContainerSecurityContext) -> Result<User, Status> {
    let field = "config.linux.security_context";
    let id = |name: &str, value: &Option<v1::Int64Value>| match value {
        Some(v1::Int64Value { value }) if !(0..=i64::from(u32::MAX)).contains(value) => Err(
            invalid(&format!("{field}.{name}"), format_args!("{value} is no id")),
        ),
        other => Ok(other.as_ref().map(|v| v.value)),
    };
    let uid = id("run_as_user", &context.run_as_user)?;
    let gid = id("run_as_group", &context.run_as_group)?;
    if gid.is_some() && uid.is_none() && context.run_as_username.is_empty() {
        return Err(invalid(
            &format!("{field}.run_as_group"),
            "is set without run_as_user or run_as_username",
        ));
    }
    if let Some(gid) = context
        .supplemental_groups
        .iter()
        .find(|gid| !(0..=i64::from(u32::MAX)).contains(*gid))
    {
        return Err(invalid(
            &format!("{field}.supplemental_groups"),
            format_args!("{gid} is no id"),
        ));
    }
    Ok(User {
        username: context.run_as_username.clone(),
        uid,
        gid,
        supplemental_groups: context.supplemental_groups.clone(),
        strict_groups: context.supplemental_groups_policy() == v1::SupplementalGroupsPolicy::Strict,
    })
}

/// A privileged container in a pod that is to have none: a caller that builds
/// the two requests from one pod says it in both, as the kubelet does.
pub fn check_privileged(
    container: &v1::ContainerConfig,
    pod: Option<&v1::PodSandboxConfig>,
) -> Result<(), Status> {
    let of_container = container.linux.as_ref();
    let of_container = of_container.and_then(|linux| linux.security_context.as_ref());
    let of_pod = pod.and_then(|pod| pod.linux.as_ref()?.security_context.as_ref());
    if of_container.is_some_and(|context| context.privileged)
        && !of_pod.is_some_and(|context| context.privileged)
    {
        return Err(invalid(
            "config.linux.security_context.privileged",
            "is set, but sandbox_config.linux.security_context.privileged is not: \
             no privileged container is allowed in such a pod sandbox",
        ));
    }
    Ok(())
}

pub(super) fn security(context: &v1::LinuxContainerSecurityContext) -> Result<Security, Status> {
    let field = "config.linux.security_context";
    // Options that are absent are those of an empty message: all POD.
    let options = context.namespace_options.clone().unwrap_or_default();
    let own_pid_namespace = options.pid() == v1::NamespaceMode::Container;
    let pid_target = match options.pid() {
        v1::NamespaceMode::Target if options.target_id.is_empty() => {
            return Err(invalid(
                &format!("{field}.namespace_options.target_id"),
                "is empty",
            ));
        }
        v1::NamespaceMode::Target => Some(options.target_id.clone()),
        _ => None,
    };
    check_apparmor(context, field)?;
    let capabilities = context.capabilities.clone().unwrap_or_default();
    Ok(Security {
        privileged: context.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        ambient_capabilities: capabilities.add_ambient_capabilities,
        read_only_root: context.readonly_rootfs,
        no_new_privileges: context.no_new_privs,
        masked_paths: context.masked_paths.iter().map(PathBuf::from).collect(),
        readonly_paths: context.readonly_paths.iter().map(PathBuf::from).collect(),
        own_pid_namespace,
        pid_target,
        host_namespaces: super::pod::host_namespaces(&options),
        seccomp: seccomp(context, field)?,
    })
}

/// What CRI's default profile is, is the runtime's choice: none, in a guest.
#[expect(deprecated, reason = "older clients say it so")]
fn check_apparmor(context: &v1::LinuxContainerSecurityContext, field: &str) -> Result<(), Status> {
    let refuse = |name: &str, profile: &str| {
        let what = format!(
            "profile {profile:?} (profiles are loaded into the node's kernel: \
             a pod with its own kernel does not have them)"
        );
        Err(unsupported(&format!("{field}.{name}"), what))
    };
    if let Some(profile) = &context.apparmor {
        // The older field is the newer one in words then.
        return match profile.profile_type() {
            v1::security_profile::ProfileType::Localhost => {
                refuse("apparmor", &profile.localhost_ref)
            }
            _ => Ok(()),
        };
    }
    match context.apparmor_profile.as_str() {
        "" | "runtime/default" | "unconfined" => Ok(()),
        other => match other.strip_prefix("localhost/") {
            Some(profile) => refuse("apparmor_profile", profile),
            None => Err(invalid(
                &format!("{field}.apparmor_profile"),
                format_args!("{other:?} is none of runtime/default, unconfined and localhost/NAME"),
            )),
        },
    }
}

#[expect(deprecated, reason = "older clients say it so")]
fn seccomp(context: &v1::LinuxContainerSecurityContext, field: &str) -> Result<Seccomp, Status> {
    use v1::security_profile::ProfileType;
    match &context.seccomp {
        Some(profile) => match profile.profile_type() {
            ProfileType::Unconfined => Ok(Seccomp::Unconfined),
            ProfileType::RuntimeDefault => Ok(Seccomp::RuntimeDefault),
            ProfileType::Localhost => {
                let field = format!("{field}.seccomp.localhost_ref");
                localhost_profile(&field, &profile.localhost_ref)
            }
        },
        // What clients of before CRI v1's `seccomp` say in words.
        None => match context.seccomp_profile_path.as_str() {
            "" | "unconfined" => Ok(Seccomp::Unconfined),
            "runtime/default" | "docker/default" => Ok(Seccomp::RuntimeDefault),
            other => {
                let field = format!("{field}.seccomp_profile_path");
                match other.strip_prefix("localhost/") {
                    Some(path) => localhost_profile(&field, path),
                    None => Err(invalid(
                        &field,
                        format_args!(
                            "{other:?} is none of runtime/default, unconfined and localhost/PATH"
                        ),
                    )),
                }
            }
        },
    }
}

fn localhost_profile(field: &str, path: &str) -> Result<Seccomp, Status> {
    match super::pod::absolute(field, path)? {
        Some(path) => Ok(Seccomp::Localhost(path)),
        None => Err(invalid(field, "is empty")),
    }
}
