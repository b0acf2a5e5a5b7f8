//! What plugins are told and what becomes of their answers, with scripts as
//! plugins: they misbehave where a test wants it.

use std::{fs, os::fd::AsFd, time::Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::time::timeout;

use super::*;
use crate::testing::{self, Host, cni, pod};

/// Waits for the end of the process whose id a script wrote to `file`: it was
/// killed, but is not this process's child to be reaped.
fn assert_ended(host: &Host, file: &str) {
    let pid = fs::read_to_string(host.dir().join(file)).unwrap();
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return,
        opened => opened.unwrap(),
    };
    let mut end = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let ended = poll(
        &mut end,
        PollTimeout::try_from(Duration::from_secs(3)).unwrap(),
    )
    .unwrap();
    assert_eq!(ended, 1, "process {pid:?} of {file} runs on");
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
    assert_ended(&host, "child");
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
    assert_ended(&host, "parent");
    assert_ended(&host, "child");
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
    assert_ended(&host, "child");
    assert_eq!(leases(&host).len(), 2);
    cni.del("p", "eth0").await.unwrap();
    assert!(leases(&host).is_empty());
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
