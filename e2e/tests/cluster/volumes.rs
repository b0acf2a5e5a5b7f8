//! Volumes that the kubelet makes.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::cluster::Namespace;
use e2e::eventually;
use serde_json::json;

use crate::{IDLE, busybox, pod};

/// The kubelet looks at its pods' volumes again every minute or so.
const REFRESHED_WITHIN: Duration = Duration::from_secs(180);

pub fn config_and_secrets_change_while_mounted(ns: &Namespace<'_>) -> Result<()> {
    ns.kubectl(&[
        "create",
        "configmap",
        "settings",
        "--from-literal=color=red",
    ])?;
    ns.kubectl(&[
        "create",
        "secret",
        "generic",
        "keys",
        "--from-literal=key=one",
    ])?;
    let mut container = busybox("c", IDLE);
    container["volumeMounts"] = json!([
        { "name": "settings", "mountPath": "/settings" },
        { "name": "keys", "mountPath": "/keys" },
        { "name": "settings", "mountPath": "/fixed", "subPath": "color" },
    ]);
    ns.apply(&pod(
        "reader",
        json!({
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
            "volumes": [
                { "name": "settings", "configMap": { "name": "settings" } },
                { "name": "keys", "secret": { "secretName": "keys" } },
            ],
        }),
    ))?;
    ns.wait("pod/reader", "condition=Ready")?;
    let seen = || {
        ns.kubectl(&[
            "exec",
            "reader",
            "--",
            "sh",
            "-c",
            "cat /settings/color; echo; cat /keys/key; echo; cat /fixed",
        ])
    };
    ensure!(seen()? == "red\none\nred", "{}", seen()?);
    ns.kubectl(&[
        "patch",
        "configmap",
        "settings",
        "-p",
        r#"{"data":{"color":"blue"}}"#,
    ])?;
    ns.kubectl(&[
        "patch",
        "secret",
        "keys",
        "-p",
        r#"{"stringData":{"key":"two"}}"#,
    ])?;
    eventually("the pod to see what changed", REFRESHED_WITHIN, || {
        let seen = seen()?;
        ensure!(seen == "blue\ntwo\nred", "{seen:?}");
        Ok::<_, anyhow::Error>(())
    })
}

pub fn a_pod_knows_itself(ns: &Namespace<'_>) -> Result<()> {
    let script = "echo $NAME $ADDRESS; cat /info/labels; echo; \
                  test -s /var/run/secrets/kubernetes.io/serviceaccount/token && \
                  cat /var/run/secrets/kubernetes.io/serviceaccount/namespace";
    let mut container = busybox("c", script);
    container["env"] = json!([
        { "name": "NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
        { "name": "ADDRESS", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
    ]);
    container["volumeMounts"] = json!([{ "name": "info", "mountPath": "/info" }]);
    ns.apply(&pod(
        "self",
        json!({
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [{ "name": "info", "downwardAPI": { "items": [
                { "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } },
            ]}}],
        }),
    ))?;
    ns.wait("pod/self", "jsonpath={.status.phase}=Succeeded")?;
    let log = ns.kubectl(&["logs", "self"])?;
    let address = ns.field("pod/self", "{.status.podIP}")?;
    let expected = format!("self {address}\napp=\"self\"\n{}", ns.name);
    ensure!(log == expected, "{log:?} instead of {expected:?}");
    Ok(())
}

pub fn directories_are_shared(ns: &Namespace<'_>) -> Result<()> {
    let mounts = json!([
        { "name": "disk", "mountPath": "/disk" },
        { "name": "memory", "mountPath": "/memory" },
    ]);
    let mut writer = busybox(
        "writer",
        &format!("echo disk > /disk/file; echo memory > /memory/file; {IDLE}"),
    );
    let mut reader = busybox("reader", IDLE);
    writer["volumeMounts"] = mounts.clone();
    reader["volumeMounts"] = mounts;
    ns.apply(&pod(
        "shared",
        json!({
            "containers": [writer, reader],
            "terminationGracePeriodSeconds": 1,
            "volumes": [
                { "name": "disk", "emptyDir": {} },
                { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } },
            ],
        }),
    ))?;
    ns.wait("pod/shared", "condition=Ready")?;
    eventually(
        "the other container's files",
        Duration::from_secs(10),
        || {
            let seen = ns.kubectl(&[
                "exec",
                "shared",
                "-c",
                "reader",
                "--",
                "cat",
                "/disk/file",
                "/memory/file",
            ])?;
            ensure!(seen == "disk\nmemory", "{seen:?}");
            Ok::<_, anyhow::Error>(())
        },
    )
}
