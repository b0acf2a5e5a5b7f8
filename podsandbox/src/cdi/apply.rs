//! The part of CDI devices' edits that CRI has no words for, put into a
//! container's OCI spec.

use oci_spec::OciSpecError;
use oci_spec::runtime::{Hook, HookBuilder, LinuxIntelRdtBuilder, MountBuilder, Spec};

use super::edits::Flags;
use super::file::{self, HookName, IntelRdt, Mount};

#[derive(Clone, Debug, Default)]
pub struct Extras {
    pub(super) flags: Flags,
    /// Those that are no bind mounts.
    pub(super) mounts: Vec<Mount>,
    pub(super) hooks: Vec<file::Hook>,
    pub(super) rdt: Option<IntelRdt>,
}

pub fn add(spec: &mut Spec, extras: &Extras) -> Result<(), OciSpecError> {
    add_mounts(spec, extras)?;
    if !extras.hooks.is_empty() {
        add_hooks(spec, &extras.hooks)?;
    }
    if let Some(rdt) = &extras.rdt {
        let mut builder = LinuxIntelRdtBuilder::default();
        if let Some(clos_id) = &rdt.clos_id {
            builder = builder.clos_id(clos_id);
        }
        if let Some(schema) = &rdt.l3_cache_schema {
            builder = builder.l3_cache_schema(schema);
        }
        if let Some(schema) = &rdt.mem_bw_schema {
            builder = builder.mem_bw_schema(schema);
        }
        if let Some(schemata) = &rdt.schemata {
            builder = builder.schemata(schemata.clone());
        }
        if rdt.enable_monitoring {
            builder = builder.enable_monitoring(true);
        }
        let mut linux = spec.linux().clone().unwrap_or_default();
        linux.set_intel_rdt(Some(builder.build()?));
        spec.set_linux(Some(linux));
    }
    Ok(())
}

fn add_mounts(spec: &mut Spec, extras: &Extras) -> Result<(), OciSpecError> {
    if extras.flags.is_empty() && extras.mounts.is_empty() {
        return Ok(());
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        if let Some(flags) = extras.flags.get(mount.destination()) {
            let mut options = mount.options().clone().unwrap_or_default();
            options.extend(flags.iter().cloned());
            mount.set_options(Some(options));
        }
    }
    for mount in &extras.mounts {
        mounts.retain(|other| *other.destination() != mount.container_path);
        mounts.push(
            MountBuilder::default()
                .destination(&mount.container_path)
                .source(&mount.host_path)
                .typ(mount.kind.as_str())
                .options(mount.options.clone())
                .build()?,
        );
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn add_hooks(spec: &mut Spec, hooks: &[file::Hook]) -> Result<(), OciSpecError> {
    let mut all = spec.hooks().clone().unwrap_or_default();
    for hook in hooks {
        let list = match hook.hook_name {
            HookName::Prestart => all.prestart_mut(),
            HookName::CreateRuntime => all.create_runtime_mut(),
            HookName::CreateContainer => all.create_container_mut(),
            HookName::StartContainer => all.start_container_mut(),
            HookName::Poststart => all.poststart_mut(),
            HookName::Poststop => all.poststop_mut(),
        };
        list.get_or_insert_default().push(oci_hook(hook)?);
    }
    spec.set_hooks(Some(all));
    Ok(())
}

fn oci_hook(hook: &file::Hook) -> Result<Hook, OciSpecError> {
    let mut builder = HookBuilder::default().path(&hook.path);
    if !hook.args.is_empty() {
        builder = builder.args(hook.args.clone());
    }
    if !hook.env.is_empty() {
        builder = builder.env(hook.env.clone());
    }
    if let Some(timeout) = hook.timeout.filter(|&timeout| timeout > 0) {
        builder = builder.timeout(timeout);
    }
    builder.build()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn an_oci_spec_gets_the_hooks_mounts_and_options() {
        let mut spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","mounts":[{"destination":"/v","source":"/h","options":["rbind","ro"]}]}"#,
        )
        .unwrap();
        let edits: file::ContainerEdits = serde_norway::from_str(
            "hooks:\n- {hookName: createRuntime, path: /h, args: [h, a], timeout: 0}\n\
             - {hookName: createRuntime, path: /i, timeout: 3}\n\
             mounts: [{hostPath: tmpfs, containerPath: /t, type: tmpfs, options: [size=1m]}]\n\
             intelRdt: {closID: c, schemata: [\"L3:0=f\"]}",
        )
        .unwrap();
        let extras = Extras {
            flags: [(PathBuf::from("/v"), vec!["nosuid".to_owned()])].into(),
            mounts: edits.mounts,
            hooks: edits.hooks,
            rdt: edits.intel_rdt,
        };
        add(&mut spec, &extras).unwrap();
        let shown = serde_json::to_value(&spec).unwrap();
        assert_eq!(
            shown["mounts"][0]["options"],
            serde_json::json!(["rbind", "ro", "nosuid"])
        );
        assert_eq!(shown["mounts"][1]["type"], "tmpfs");
        let hooks = &shown["hooks"]["createRuntime"];
        assert_eq!(hooks[0]["args"], serde_json::json!(["h", "a"]));
        assert!(hooks[0].get("timeout").is_none());
        assert_eq!(hooks[1]["timeout"], 3);
        assert_eq!(shown["linux"]["intelRdt"]["closID"], "c");
    }
}
