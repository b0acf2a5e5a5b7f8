//! Which values cannot work whatever the node is like. Each is told by its key.

use std::path::Path;

use podsandbox::Exempt;
use podsandbox::config::{HostPods, RuntimeConfig, UIDS};

use super::Config;
use crate::traces;

/// A key, and what is wrong with its value.
pub(super) type Wrong = (String, String);

pub(super) fn validate(config: &Config) -> Result<(), Wrong> {
    if !config.runtimes.contains_key(&config.default_runtime) {
        return fail(
            "default_runtime",
            format!("{:?} is not among runtimes", config.default_runtime),
        );
    }
    let network = &config.network;
    for (field, path) in [
        ("socket", &config.socket),
        ("root", &config.root),
        ("run_dir", &config.run_dir),
        ("vmm", &config.vmm),
        ("shim", &config.shim),
        ("unpacker", &config.unpacker),
        ("network.conf_dir", &network.conf_dir),
        ("network.netns_dir", &network.netns_dir),
    ]
    .into_iter()
    .chain(
        config
            .cdi_spec_dirs
            .iter()
            .map(|dir| ("cdi_spec_dirs", dir)),
    )
    .chain(network.bin_dirs.iter().map(|dir| ("network.bin_dirs", dir)))
    {
        absolute(field, path)?;
    }
    for name in &network.source_check_exempt {
        if name != Exempt::ALL && !is_namespace(name) {
            let why = format!("{name:?} is neither a Kubernetes namespace's name nor \"*\"");
            return fail("network.source_check_exempt", why);
        }
    }
    // The highest number is nobody's.
    let last = u32::MAX - UIDS - 1;
    if !(1..=last).contains(&config.uid_base) {
        return fail(
            "uid_base",
            format!(
                "{} is not in 1 to {last}: {} ids follow it",
                config.uid_base,
                UIDS + 1
            ),
        );
    }
    for (field, seconds) in [
        (
            "network.plugin_timeout_seconds",
            network.plugin_timeout_seconds,
        ),
        (
            "streaming.idle_timeout_seconds",
            config.streaming.idle_timeout_seconds,
        ),
    ] {
        if seconds == 0 {
            return fail(field, "must be positive".to_owned());
        }
    }
    if config.metrics.address.is_some_and(|at| at.port() == 0) {
        let why = "has port 0, which no scraper can know: name one";
        return fail("metrics.address", why.to_owned());
    }
    if let Some(endpoint) = &config.traces.endpoint
        && let Err(why) = traces::check(endpoint)
    {
        return fail("traces.endpoint", why);
    }
    for (name, runtime) in &config.runtimes {
        handler(config, name, runtime)?;
    }
    let images = config.images.validate();
    images.map_err(|why| ("images".to_owned(), why.to_string()))
}

fn fail(field: &str, why: String) -> Result<(), Wrong> {
    Err((field.to_owned(), why))
}

/// A label of RFC 1123, as Kubernetes has it.
fn is_namespace(name: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&name.len())
        && name.chars().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn absolute(field: &str, path: &Path) -> Result<(), Wrong> {
    if path.is_absolute() {
        return Ok(());
    }
    fail(field, format!("{path:?} is not an absolute path"))
}

fn handler(config: &Config, name: &str, runtime: &RuntimeConfig) -> Result<(), Wrong> {
    let field = |key: &str| format!("runtimes.{name}.{key}");
    if name == HostPods::REFUSE {
        let why = "is what `host_namespaces` says instead of a handler's name";
        return fail(&format!("runtimes.{name}"), why.to_owned());
    }
    if let Some(program) = &runtime.oci {
        let alone = RuntimeConfig {
            oci: runtime.oci.clone(),
            ..RuntimeConfig::default()
        };
        if *runtime != alone {
            let why = "runs pods on the host's kernel: no other key has a meaning beside it";
            return fail(&field("oci"), why.to_owned());
        }
        if program.as_os_str().is_empty() {
            return fail(&field("oci"), "is empty".to_owned());
        }
        return Ok(());
    }
    if let HostPods::Handler(fallback) = &runtime.host_namespaces
        && fallback != HostPods::HANDLER
        && config
            .runtimes
            .get(fallback)
            .is_none_or(|to| to.oci.is_none())
    {
        return fail(
            &field("host_namespaces"),
            format!("{fallback:?} is no handler with `oci` among runtimes"),
        );
    }
    if runtime.default_memory_mib < 64 {
        return fail(
            &field("default_memory_mib"),
            "is below 64, too little for a guest kernel".to_owned(),
        );
    }
    if !(1..=32).contains(&runtime.disk_slots) {
        return fail(
            &field("disk_slots"),
            format!("{} is not in 1 to 32", runtime.disk_slots),
        );
    }
    if !(1..=32).contains(&runtime.net_queues) {
        return fail(
            &field("net_queues"),
            format!("{} is not in 1 to 32", runtime.net_queues),
        );
    }
    if runtime.scratch_gib == 0 || runtime.boot_timeout_seconds == 0 || runtime.default_vcpus == 0 {
        return fail(
            &field("scratch_gib, boot_timeout_seconds, default_vcpus"),
            "must be positive".to_owned(),
        );
    }
    absolute(&field("kernel"), runtime.kernel.as_ref())?;
    absolute(&field("initramfs"), runtime.initramfs.as_ref())
}

#[cfg(test)]
mod tests {
    use crate::config::tests::load;

    #[test]
    fn a_value_that_cannot_work_is_refused_by_its_key() {
        let error = load("default_runtime: kata\n").unwrap_err().to_string();
        assert!(error.contains("default_runtime"), "{error}");
        for key in ["disk_slots", "net_queues"] {
            let error = load(&format!("runtimes: {{microvm: {{{key}: 0}}}}\n"));
            let error = error.unwrap_err().to_string();
            assert!(
                error.contains(&format!("runtimes.microvm.{key}")),
                "{error}"
            );
        }
        for (runtimes, field) in [
            (
                "h: {oci: runc, scratch_gib: 5}, microvm: {}",
                "runtimes.h.oci",
            ),
            ("h: {oci: ''}, microvm: {}", "runtimes.h.oci"),
            ("refuse: {oci: runc}, microvm: {}", "runtimes.refuse"),
            (
                "microvm: {host_namespaces: hsot}",
                "runtimes.microvm.host_namespaces",
            ),
            (
                "microvm: {host_namespaces: other}, other: {}",
                "runtimes.microvm.host_namespaces",
            ),
        ] {
            let error = load(&format!("runtimes: {{{runtimes}}}\n"));
            let error = error.unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        for fine in [
            "microvm: {}",
            "microvm: {host_namespaces: refuse}",
            "microvm: {host_namespaces: h}, h: {oci: /usr/bin/crun}",
        ] {
            load(&format!("runtimes: {{{fine}}}\n")).unwrap();
        }
        let error = load("cdi_spec_dirs: [etc/cdi]\n").unwrap_err().to_string();
        assert!(error.contains("cdi_spec_dirs"), "{error}");
        let error = load("streaming: {idle_timeout_seconds: 0}\n");
        let error = error.unwrap_err().to_string();
        assert!(error.contains("streaming.idle_timeout_seconds"), "{error}");
        for bad in ["127.0.0.1:0", "127.0.0.1", "localhost:9750"] {
            let error = load(&format!("metrics: {{address: '{bad}'}}\n"));
            let error = error.unwrap_err().to_string();
            assert!(error.contains("metrics.address"), "{error}");
        }
        for bad in ["", "localhost:4317", "https://traces:4317", "http://"] {
            let error = load(&format!("traces: {{endpoint: '{bad}'}}\n"));
            let error = error.unwrap_err().to_string();
            assert!(error.contains("traces.endpoint"), "{bad}: {error}");
        }
        load("traces: {endpoint: 'http://[::1]:4317'}\n").unwrap();
        let fine = load("metrics: {address: '[::1]:9750'}\n").unwrap();
        assert_eq!(fine.metrics.address, "[::1]:9750".parse().ok());
        let limit = "runtimes: {microvm: {disk_limit: {bytes_per_second: 0}}}\n";
        let error = load(limit).unwrap_err().to_string();
        assert!(error.contains("disk_limit"), "{error}");
    }

    #[test]
    fn what_would_fail_every_pod_or_the_daemon_is_refused_by_its_key() {
        for (text, field) in [
            ("network: {netns_dir: run/netns}", "network.netns_dir"),
            ("network: {bin_dirs: [bin]}", "network.bin_dirs"),
            (
                "network: {plugin_timeout_seconds: 0}",
                "network.plugin_timeout_seconds",
            ),
            (
                "network: {source_check_exempt: [kube_system]}",
                "network.source_check_exempt",
            ),
            (
                "network: {source_check_exempt: ['-']}",
                "network.source_check_exempt",
            ),
            ("vmm: drupe-vmm", "vmm"),
            ("uid_base: 0", "uid_base"),
            ("unpacker: drupe-unpacker", "unpacker"),
            ("uid_base: 4294901759", "uid_base"),
            (
                "runtimes: {microvm: {kernel: kernel}}",
                "runtimes.microvm.kernel",
            ),
            ("images: {parallel_layers: 0}", "images: parallel_layers"),
            (
                "images: {registries: {reg.local: {mirrors: [ftp://m]}}}",
                "images: registries: reg.local",
            ),
            (
                "images: {registries: {reg.local: {ca_file: /none.pem}}}",
                "/none.pem",
            ),
            ("images: {pinned: ['UPPER:x:y']}", "images: pinned"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(field), "{text}: {error}");
        }
        load("uid_base: 4294901758").unwrap();
        load("network: {source_check_exempt: [kube-system, '*']}").unwrap();
    }
}
