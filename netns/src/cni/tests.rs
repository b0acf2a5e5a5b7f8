//! With Debian's own plugins, and with scripts where a plugin has to misbehave.

use std::{fs, num::NonZeroU16, os::unix::fs::PermissionsExt, time::Instant};

use tokio::time::timeout;

use super::*;
use crate::{
    Netns, read_interface,
    testing::{self, Host, bridge_network, cni, pod, run},
};

/// All that a pod's network may leave behind.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Census {
    links: Vec<String>,
    leases: Vec<String>,
    rules: Vec<String>,
    records: Vec<String>,
    mounts: Vec<String>,
}

pub(super) fn census(host: &Host) -> Census {
    let words = |text: String, n: usize| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.split_whitespace().nth(n).map(str::to_owned))
            .collect()
    };
    let mut rules = Vec::new();
    for program in ["iptables-save", "ip6tables-save"] {
        let saved = run(program, &[]);
        // Without comments, which hold the time, and counters.
        rules.extend(
            saved
                .lines()
                .filter(|l| l.starts_with("-A"))
                .map(str::to_owned),
        );
    }
    Census {
        links: words(run("ip", &["-o", "link"]), 1),
        leases: leases(host),
        rules,
        records: names(&host.dir().join("records")),
        // Only this test's: others' go when their mount points are removed.
        mounts: host
            .mounts()
            .lines()
            .filter(|line| line.contains(host.dir().to_str().unwrap()))
            .map(str::to_owned)
            .collect(),
    }
}

pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The addresses that host-local holds for the network `pods`.
pub(super) fn leases(host: &Host) -> Vec<String> {
    let mut names = names(&host.dir().join("leases/pods"));
    names.retain(|name| !name.starts_with("last_reserved") && name != "lock");
    names
}

pub(super) fn script(host: &Host, name: &str, text: &str) {
    let text = format!("cd {}\n{text}", host.dir().display());
    executable(&host.dir().join("bin").join(name), &text);
}

pub(super) fn executable(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// `bridge_network`'s bridge followed by plugins of the test's own.
pub(super) fn bridge_then(host: &Host, version: &str, kinds: &[&str]) -> NetworkList {
    let bridge = bridge_network(host).plugins[0].config.clone();
    let mut plugins = vec![Value::Object(bridge)];
    plugins.extend(kinds.iter().map(|kind| json!({"type": kind})));
    only(version, &json!(plugins))
}

pub(super) fn only(version: &str, plugins: &Value) -> NetworkList {
    let config = json!({"cniVersion": version, "name": "pods", "plugins": plugins});
    NetworkList::parse(Path::new("t.conflist"), config.to_string().as_bytes()).unwrap()
}

pub(super) async fn netns(host: &Host, name: &str) -> Netns {
    Netns::create(&host.dir().join("netns"), name)
        .await
        .unwrap()
}

pub(super) async fn collect(
    cni: &Cni,
    network: Option<&NetworkList>,
    valid: &BTreeSet<Attachment>,
) {
    let collection = cni.begin_gc(valid.clone()).await.unwrap();
    collection.finish(network).await.unwrap();
}

#[tokio::test]
async fn a_dual_stack_pod_with_a_host_port_and_a_rate_leaves_nothing_behind() {
    let host = Host::enter();
    let cni = cni(&host);
    let network = bridge_network(&host);

    // The first pod makes what all pods share: the bridge and the top chains.
    let first = netns(&host, "first").await;
    let mut wants = pod("first", &first);
    wants.port_mappings = vec![PortMapping {
        host_port: NonZeroU16::new(8081).unwrap(),
        container_port: NonZeroU16::new(80).unwrap(),
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    cni.add(&network, &wants).await.unwrap();
    cni.del("first", "eth0").await.unwrap();
    first.remove().await.unwrap();
    let before = census(&host);
    assert!(
        before.leases.is_empty() && before.records.is_empty(),
        "{before:?}"
    );

    let ns = netns(&host, "pod").await;
    let mut wants = pod("second", &ns);
    wants.port_mappings = vec![PortMapping {
        host_port: NonZeroU16::new(8080).unwrap(),
        container_port: NonZeroU16::new(80).unwrap(),
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    wants.bandwidth = Some(Bandwidth {
        ingress_rate: Some(8_000_000),
        egress_rate: Some(4_000_000),
        ..Bandwidth::default()
    });
    let result = cni.add(&network, &wants).await.unwrap();
    let ips: Vec<_> = result.pod_ips().collect();
    assert_eq!(ips.len(), 2, "{result:?}");
    assert!(ips[0].is_ipv4() && ips[1].is_ipv6());

    let during = census(&host);
    assert_eq!(during.leases.len(), 2);
    assert!(
        during
            .rules
            .iter()
            .any(|rule| rule.contains("--dport 8080")),
        "{during:?}"
    );
    assert!(run("tc", &["qdisc"]).contains("tbf"));
    let interface = read_interface(&ns, "eth0").await.unwrap();
    let read: Vec<_> = interface.addresses.iter().map(|net| net.addr()).collect();
    assert_eq!(read, ips);
    assert_eq!(interface.mtu, 1400);
    let gateways: Vec<String> = interface
        .routes
        .iter()
        .map(|route| format!("{} {}", route.destination, route.gateway.unwrap()))
        .collect();
    assert_eq!(gateways, ["0.0.0.0/0 10.88.0.1", "::/0 fd00:88::1"]);

    // Another Cni, as after a restart, knows the attachment.
    let restarted = testing::cni(&host);
    assert_eq!(restarted.result("second", "eth0").await.unwrap(), result);
    assert!(matches!(
        restarted.add(&network, &wants).await,
        Err(CniError::AlreadyAttached { .. })
    ));
    restarted.del("second", "eth0").await.unwrap();
    restarted.del("second", "eth0").await.unwrap();
    ns.remove().await.unwrap();
    assert_eq!(census(&host), before);
}

/// With Debian's portmap, which looks for a dual-stack pod's IPv4 rules among
/// those of IPv6, and its bandwidth, which crashes for a pod without a rate.
#[tokio::test]
async fn check_tells_an_attachment_that_was_tampered_with_and_no_other() {
    let host = Host::enter();
    let cni = cni(&host);
    let ns = netns(&host, "pod").await;
    let mut wants = pod("p", &ns);
    wants.port_mappings = vec![PortMapping {
        host_port: NonZeroU16::new(8080).unwrap(),
        container_port: NonZeroU16::new(80).unwrap(),
        protocol: Protocol::Tcp,
        host_ip: None,
    }];
    cni.add(&bridge_network(&host), &wants).await.unwrap();
    for _ in 0..2 {
        let complaints = cni.check("p", "eth0").await.unwrap();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
    testing::ip(ns.path(), "address flush dev eth0");
    let complaints = cni.check("p", "eth0").await.unwrap();
    assert_eq!(complaints.len(), 1, "{complaints:?}");
    let complaint = complaints[0].to_string();
    assert!(
        complaint.contains("bridge (CHECK of pod p) failed: "),
        "{complaint}"
    );
    cni.del("p", "eth0").await.unwrap();
    assert!(matches!(
        cni.check("p", "eth0").await,
        Err(CniError::NotAttached { .. })
    ));
}

#[tokio::test]
async fn check_is_not_asked_of_a_network_that_has_none() {
    let host = Host::enter();
    let cni = cni(&host);
    script(
        &host,
        "tells",
        r#"echo $CNI_COMMAND >> calls; echo '{"ips":[{"address":"10.1.1.1/24"}]}'"#,
    );
    let ns = netns(&host, "pod").await;
    let mut disabled = only("1.0.0", &json!([{"type": "tells"}]));
    disabled.disable_check = true;
    let old = only("0.3.1", &json!([{"type": "tells"}]));
    for network in [disabled, old] {
        cni.add(&network, &pod("p", &ns)).await.unwrap();
        assert!(cni.check("p", "eth0").await.unwrap().is_empty());
        cni.del("p", "eth0").await.unwrap();
    }
    let calls = fs::read_to_string(host.dir().join("calls")).unwrap();
    assert_eq!(calls, "ADD\nDEL\nADD\nDEL\n");
}

#[tokio::test]
async fn del_needs_neither_the_namespace_nor_the_configuration() {
    let host = Host::enter();
    let ns = netns(&host, "pod").await;
    let version_0_3 = bridge_then(&host, "0.3.1", &[]);
    cni(&host).add(&version_0_3, &pod("p", &ns)).await.unwrap();
    assert_eq!(leases(&host).len(), 2);
    ns.remove().await.unwrap();
    fs::write(ns.path(), "").unwrap();
    cni(&host).del("p", "eth0").await.unwrap();
    assert!(leases(&host).is_empty());
    assert!(names(&host.dir().join("records")).is_empty());
}

#[tokio::test]
async fn gc_detaches_what_nobody_answers_for() {
    let host = Host::enter();
    let cni = cni(&host);
    let network = bridge_then(&host, "1.0.0", &[]);
    for name in ["kept", "stale"] {
        let ns = netns(&host, name).await;
        cni.add(&network, &pod(name, &ns)).await.unwrap();
    }
    assert_eq!(leases(&host).len(), 4);
    let kept = Attachment {
        sandbox_id: "kept".to_owned(),
        interface: "eth0".to_owned(),
    };
    let valid = BTreeSet::from([kept.clone()]);
    collect(&cni, Some(&network), &valid).await;
    assert_eq!(leases(&host).len(), 2);
    assert_eq!(cni.attachments().await.unwrap(), [kept]);
    assert!(cni.check("kept", "eth0").await.unwrap().is_empty());
    collect(&cni, None, &BTreeSet::new()).await;
    assert!(leases(&host).is_empty());
}

#[tokio::test]
async fn a_pod_that_comes_during_a_collection_waits_a_little_and_is_kept() {
    let host = Host::enter();
    let mut cni = Cni::new(CniOptions {
        bin_dirs: vec![host.dir().join("bin"), testing::PLUGINS.into()],
        record_dir: host.dir().join("records"),
        timeout: Duration::from_secs(20),
    });
    script(
        &host,
        "hangs",
        r#"case $CNI_COMMAND in
        VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.1.0"]}' ;;
        GC) exec sleep 1000 ;;
        *) echo '{"ips":[{"address":"10.1.1.1/24"}]}' ;;
        esac"#,
    );
    let network = only("1.1.0", &json!([{"type": "hangs"}]));
    let stale = netns(&host, "stale").await;
    cni.add(&network, &pod("stale", &stale)).await.unwrap();
    cni.runner.timeout = Duration::from_secs(2);

    let collection = cni.begin_gc(BTreeSet::new()).await.unwrap();
    let ns = netns(&host, "new").await;
    let new = pod("new", &ns);
    let add = cni.add(&network, &new);
    tokio::pin!(add);
    // The specification keeps the two apart.
    assert!(
        timeout(Duration::from_millis(200), &mut add).await.is_err(),
        "ADD ran beside GC"
    );
    let (collected, added) = tokio::join!(collection.finish(Some(&network)), add);
    let error = collected.unwrap_err();
    assert!(error.timed_out(), "{error}");
    added.unwrap();
    let left = cni.attachments().await.unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0].sandbox_id, "new");
}

#[tokio::test]
async fn a_failing_plugin_is_named_and_what_came_before_it_undone() {
    let host = Host::enter();
    let cni = cni(&host);
    script(
        &host,
        "moody",
        r#"ls records > seen
        [ $CNI_COMMAND = DEL ] && exit 0
        echo '{"cniVersion":"1.0.0","code":11,"msg":"no mood","details":"ask later"}'; exit 1"#,
    );
    let ns = netns(&host, "pod").await;
    let network = bridge_then(&host, "1.0.0", &["moody"]);
    let error = cni.add(&network, &pod("p", &ns)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "CNI plugin moody (ADD of pod p) failed: no mood; ask later (code 11)"
    );
    assert!(leases(&host).is_empty());
    assert!(!testing::ip(ns.path(), "link").contains("eth0"));
    assert!(names(&host.dir().join("records")).is_empty());
    // The record was there before the plugin ran.
    assert_eq!(
        fs::read_to_string(host.dir().join("seen")).unwrap(),
        "p:eth0.lock\npods-p-eth0.json\n"
    );
}

#[tokio::test]
async fn a_failing_undo_is_told_and_can_be_tried_again() {
    let host = Host::enter();
    let cni = cni(&host);
    script(&host, "broken", "echo 'it is late' >&2; exit 3");
    let ns = netns(&host, "pod").await;
    let network = bridge_then(&host, "1.0.0", &["broken"]);
    let error = cni
        .add(&network, &pod("p", &ns))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("broken (ADD of pod p) ended with exit status: 3: it is late; undoing it failed too: CNI plugin broken (DEL"),
        "{error}"
    );
    assert_eq!(leases(&host).len(), 2);
    cni.del("p", "eth0").await.unwrap_err();
    script(&host, "broken", "exit 0");
    cni.del("p", "eth0").await.unwrap();
    assert!(leases(&host).is_empty());
}

#[tokio::test]
async fn a_del_that_fails_once_is_no_failure() {
    let host = Host::enter();
    let cni = cni(&host);
    script(
        &host,
        "stumble",
        r#"echo $CNI_COMMAND >> calls
        case $CNI_COMMAND in
        ADD) echo '{"cniVersion":"1.0.0"}' ;;
        DEL) [ -e fell ] || { touch fell; exit 1; } ;;
        esac"#,
    );
    let ns = netns(&host, "pod").await;
    let network = only("1.0.0", &json!([{"type": "stumble"}]));
    cni.add(&network, &pod("p", &ns)).await.unwrap();
    cni.del("p", "eth0").await.unwrap();
    let calls = fs::read_to_string(host.dir().join("calls")).unwrap();
    assert_eq!(calls, "ADD\nDEL\nDEL\n");
    assert!(names(&host.dir().join("records")).is_empty());
}

#[tokio::test]
async fn a_service_that_a_plugin_leaves_holds_up_nobody() {
    let host = Host::enter();
    let cni = cni(&host);
    script(
        &host,
        "serve",
        r#"case $CNI_COMMAND in
        ADD) sleep 300 > out & echo $! > child; echo '{"cniVersion":"1.0.0"}' ;;
        CHECK) [ -d /proc/$(cat child) ] ;;
        DEL) kill $(cat child) ;;
        esac"#,
    );
    let ns = netns(&host, "pod").await;
    let network = only("1.0.0", &json!([{"type": "serve"}]));
    let started = Instant::now();
    cni.add(&network, &pod("p", &ns)).await.unwrap();
    cni.check("p", "eth0").await.unwrap();
    cni.del("p", "eth0").await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_ended(&host, "child").await;
}

#[tokio::test]
async fn a_hanging_plugin_and_its_children_are_killed_in_time() {
    let host = Host::enter();
    script(
        &host,
        "hang",
        "[ $CNI_COMMAND = DEL ] && exit 0; sleep 300 & echo $! > child; echo $$ > parent; wait",
    );
    let cni = Cni::new(CniOptions {
        bin_dirs: vec![host.dir().join("bin")],
        record_dir: host.dir().join("records"),
        timeout: Duration::from_millis(500),
    });
    let ns = netns(&host, "pod").await;
    let network = only("1.0.0", &json!([{"type": "hang"}]));
    let started = Instant::now();
    let error = cni.add(&network, &pod("p", &ns)).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(3));
    assert!(error.timed_out());
    assert_eq!(
        error.to_string(),
        "CNI plugin hang (ADD of pod p) did not end within 0.5 s and was killed"
    );
    assert_ended(&host, "parent").await;
    assert_ended(&host, "child").await;
    assert!(names(&host.dir().join("records")).is_empty());
}

#[tokio::test]
async fn a_caller_that_gives_up_kills_the_plugin_and_can_still_undo() {
    let host = Host::enter();
    let cni = cni(&host);
    script(
        &host,
        "hang",
        "[ $CNI_COMMAND = DEL ] && exit 0; sleep 300 & echo $! > child; mkfifo go; cat go",
    );
    let ns = netns(&host, "pod").await;
    let network = bridge_then(&host, "1.0.0", &["hang"]);
    let pod = pod("p", &ns);
    let gave_up = timeout(Duration::from_secs(2), cni.add(&network, &pod)).await;
    assert!(gave_up.is_err());
    assert_ended(&host, "child").await;
    assert_eq!(leases(&host).len(), 2);
    cni.del("p", "eth0").await.unwrap();
    assert!(leases(&host).is_empty());
}

/// Waits for the end of the process whose id a script wrote to `file`: it was
/// killed, but is not this process's child to be reaped.
async fn assert_ended(host: &Host, file: &str) {
    let pid = fs::read_to_string(host.dir().join(file)).unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", pid.trim()));
    let running = || fs::read_to_string(&status).is_ok_and(|status| !status.contains("State:\tZ"));
    let deadline = Instant::now() + Duration::from_secs(3);
    while running() {
        assert!(
            Instant::now() < deadline,
            "process {} of {file} runs on",
            pid.trim()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_plugin_that_talks_nonsense_or_without_end_is_an_error() {
    let host = Host::enter();
    let cni = cni(&host);
    let ns = netns(&host, "pod").await;
    script(&host, "nonsense", "[ $CNI_COMMAND = DEL ] || echo hello");
    script(&host, "flood", "[ $CNI_COMMAND = DEL ] || yes");
    script(
        &host,
        "shout",
        "[ $CNI_COMMAND = DEL ] || { yes | head -c 3000000 >&2; exit 1; }",
    );
    let add = async |kind: &str| {
        let network = only("1.0.0", &json!([{"type": kind}]));
        cni.add(&network, &pod("p", &ns)).await.unwrap_err()
    };
    assert!(matches!(add("nonsense").await, CniError::Answer { .. }));
    assert!(matches!(add("flood").await, CniError::TooMuchOutput { .. }));
    match add("shout").await {
        CniError::Exit { stderr, .. } => assert!(stderr.len() <= 4096 && stderr.starts_with('y')),
        error => panic!("{error}"),
    }
    let missing = add("missing").await.to_string();
    assert!(
        missing.contains("CNI plugin missing is not in "),
        "{missing}"
    );
    assert!(names(&host.dir().join("records")).is_empty());
}

#[tokio::test]
async fn gc_and_status_go_only_to_plugins_that_know_them() {
    let host = Host::enter();
    let cni = cni(&host);
    let plugin = |versions: &str| {
        format!(
            r#"echo $CNI_COMMAND >> calls
            case $CNI_COMMAND in
            VERSION) echo '{{"cniVersion":"1.1.0","supportedVersions":[{versions}]}}' ;;
            GC) cat > gc ;;
            STATUS) echo '{{"cniVersion":"1.1.0","code":50,"msg":"no uplink"}}'; exit 1 ;;
            esac"#
        )
    };
    script(&host, "old", &plugin(r#""0.4.0","1.0.0""#));
    script(&host, "new", &plugin(r#""1.0.0","1.1.0""#));
    let calls = || {
        let calls = fs::read_to_string(host.dir().join("calls")).unwrap_or_default();
        fs::remove_file(host.dir().join("calls")).ok();
        calls
    };
    let valid = BTreeSet::from([Attachment {
        sandbox_id: "a".to_owned(),
        interface: "eth0".to_owned(),
    }]);

    let old_list = only("1.0.0", &json!([{"type": "new"}]));
    cni.status(&old_list).await.unwrap();
    assert_eq!(calls(), "");

    let old = only("1.1.0", &json!([{"type": "old"}]));
    cni.status(&old).await.unwrap();
    collect(&cni, Some(&old), &valid).await;
    assert_eq!(calls(), "VERSION\nVERSION\n");

    let new = only("1.1.0", &json!([{"type": "new"}]));
    let error = cni.status(&new).await.unwrap_err().to_string();
    assert_eq!(error, "CNI plugin new (STATUS) failed: no uplink (code 50)");
    collect(&cni, Some(&new), &valid).await;
    let sent: Value = serde_json::from_slice(&fs::read(host.dir().join("gc")).unwrap()).unwrap();
    assert_eq!(
        sent["cni.dev/valid-attachments"],
        json!([{"containerID": "a", "ifname": "eth0"}])
    );
}

#[tokio::test]
async fn plugins_get_the_environment_and_input_of_the_specification() {
    let host = Host::enter();
    let cni = cni(&host);
    script(
        &host,
        "show",
        r#"env | grep ^CNI_ | sort > env.$CNI_COMMAND
        cat > in.$CNI_COMMAND; echo '{"ips":[{"address":"10.1.1.1/24"}]}'"#,
    );
    let ns = netns(&host, "pod").await;
    let network = only(
        "1.0.0",
        &json!([{"type": "show"}, {"type": "show", "capabilities": {"dns": true}}]),
    );
    let mut pod = pod("p", &ns);
    pod.dns = Some(PodDns {
        servers: vec!["10.0.0.10".to_owned()],
        ..PodDns::default()
    });
    let result = cni.add(&network, &pod).await.unwrap();
    assert_eq!(result.pod_ips().count(), 1);
    let read = |name: &str| fs::read_to_string(host.dir().join(name)).unwrap();
    let dir = host.dir().display();
    assert_eq!(
        read("env.ADD"),
        format!(
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p;\
             K8S_POD_INFRA_CONTAINER_ID=p;K8S_POD_UID=uid-p\nCNI_COMMAND=ADD\n\
             CNI_CONTAINERID=p\nCNI_IFNAME=eth0\nCNI_NETNS={dir}/netns/pod\n\
             CNI_PATH={dir}/bin:/usr/lib/cni\n"
        )
    );
    let second: Value = serde_json::from_str(&read("in.ADD")).unwrap();
    let previous = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.1.1.1/24"}]});
    assert_eq!(
        second,
        json!({
            "cniVersion": "1.0.0", "name": "pods", "type": "show", "prevResult": previous,
            "runtimeConfig": {
                "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []},
            },
        })
    );
    // The chain runs backwards: the first plugin is the last to be asked.
    cni.del("p", "eth0").await.unwrap();
    let last: Value = serde_json::from_str(&read("in.DEL")).unwrap();
    assert_eq!(last.get("runtimeConfig"), None);
    assert_eq!(last["prevResult"], previous);
}
