//! Volumes that outlive their pods.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{NODE, Namespace};
use e2e::{eventually, output};
use serde_json::{Value, json};

use crate::{IDLE, busybox, pod};

/// A guest may believe for a second what it knows of a file.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);

/// A directory of the node's, for one test.
fn directory(ns: &Namespace<'_>) -> Result<PathBuf> {
    let dir = ns.node()?.dir.join(&ns.name);
    fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
    Ok(dir)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

pub fn directories_of_the_node_are_shared(ns: &Namespace<'_>) -> Result<()> {
    let dir = directory(ns)?;
    fs::write(dir.join("file"), "of the node\n")?;
    let script = format!("echo of the pod > /made/new; mv /made/new /made/file; {IDLE}");
    let mut container = busybox("c", &script);
    container["volumeMounts"] = json!([
        { "name": "dir", "mountPath": "/dir", "readOnly": true },
        { "name": "file", "mountPath": "/file" },
        { "name": "made", "mountPath": "/made" },
    ]);
    ns.apply(&pod(
        "local",
        json!({
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
            "volumes": [
                { "name": "dir", "hostPath": { "path": dir, "type": "Directory" } },
                { "name": "file", "hostPath": { "path": dir.join("file"), "type": "File" } },
                { "name": "made", "hostPath": {
                    "path": dir.join("made"), "type": "DirectoryOrCreate",
                }},
            ],
        }),
    ))?;
    ns.wait("pod/local", "condition=Ready")?;
    // A container is ready once its shell runs.
    let script = "until [ -e /made/file ]; do sleep 0.1; done; cat /dir/file /file";
    let exec = |line: &str| ns.try_kubectl(&["exec", "local", "--", "sh", "-c", line], None);
    let seen = exec(script)?;
    ensure!(seen.stdout == b"of the node\nof the node\n", "{seen:?}");
    let refused = exec("echo > /dir/another")?;
    ensure!(
        !refused.status.success(),
        "it is not read-only: {refused:?}"
    );
    let made = read(&dir.join("made/file"))?;
    ensure!(made == "of the pod\n", "{made:?}");
    fs::write(dir.join("made/file"), "of the node, later\n")?;
    eventually("the pod to see the change", KNOWN_WITHIN, || {
        let seen = exec("cat /made/file")?;
        ensure!(seen.stdout == b"of the node, later\n", "{seen:?}");
        Ok::<_, anyhow::Error>(())
    })
}

pub fn parts_of_volumes_are_mounted(ns: &Namespace<'_>) -> Result<()> {
    let dir = directory(ns)?;
    fs::create_dir(dir.join("sub"))?;
    fs::write(dir.join("sub/file"), "in sub\n")?;
    let script = format!(
        "cat /sub/file /file > /own/seen && echo $NAME > /own/name && echo more >> /file && \
         echo > /scratch/here; {IDLE}"
    );
    let mut container = busybox("c", &script);
    container["env"] = json!([
        { "name": "NAME", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } },
    ]);
    container["volumeMounts"] = json!([
        { "name": "dir", "mountPath": "/sub", "subPath": "sub" },
        { "name": "dir", "mountPath": "/file", "subPath": "sub/file" },
        { "name": "dir", "mountPath": "/own", "subPathExpr": "of/$(NAME)" },
        { "name": "scratch", "mountPath": "/scratch", "subPath": "a/b" },
        { "name": "scratch", "mountPath": "/whole" },
    ]);
    ns.apply(&pod(
        "parts",
        json!({
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
            "volumes": [
                { "name": "dir", "hostPath": { "path": dir, "type": "Directory" } },
                { "name": "scratch", "emptyDir": {} },
            ],
        }),
    ))?;
    ns.wait("pod/parts", "condition=Ready")?;
    // The container is ready once its shell runs, and may not be done.
    let script = "until [ -e /whole/a/b/here ]; do sleep 0.1; done; ls /sub";
    let seen = ns.kubectl(&["exec", "parts", "--", "sh", "-c", script])?;
    ensure!(seen == "file", "{seen:?}");
    let seen = read(&dir.join("of/parts/seen"))?;
    ensure!(seen == "in sub\nin sub\n", "{seen:?}");
    let own = read(&dir.join("of/parts/name"))?;
    let file = read(&dir.join("sub/file"))?;
    ensure!(
        own == "parts\n" && file == "in sub\nmore\n",
        "{own:?}, {file:?}"
    );
    Ok(())
}

/// A persistent volume of the node at `path`, and the claim `data` of it.
fn claim(ns: &Namespace<'_>, mode: &str, path: &Path) -> Result<()> {
    let volume = &ns.name;
    let class = json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": { "name": volume },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    });
    let on_node = json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": [NODE] });
    let persistent = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": { "name": volume },
        "spec": {
            "capacity": { "storage": "16Mi" },
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": volume,
            "volumeMode": mode,
            "local": { "path": path },
            "nodeAffinity": { "required": { "nodeSelectorTerms": [
                { "matchExpressions": [on_node] },
            ]}},
        },
    });
    let claim = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": { "name": "data" },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": volume,
            "volumeMode": mode,
            "resources": { "requests": { "storage": "16Mi" } },
        },
    });
    for object in [&class, &persistent, &claim] {
        ns.apply(object)?;
    }
    Ok(())
}

/// Runs `script` to its end in a pod that has the claim; returns what it said.
fn run(ns: &Namespace<'_>, name: &str, script: &str, used: (&str, Value)) -> Result<String> {
    let mut container = busybox("c", script);
    container[used.0] = used.1;
    ns.apply(&pod(
        name,
        json!({
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": "data" } }],
        }),
    ))?;
    ns.wait(&format!("pod/{name}"), "jsonpath={.status.phase}=Succeeded")?;
    let said = ns.kubectl(&["logs", name])?;
    ns.kubectl(&["delete", "pod", name, "--timeout=60s"])?;
    Ok(said)
}

pub fn files_of_a_claim_outlive_pods(ns: &Namespace<'_>) -> Result<()> {
    let dir = directory(ns)?;
    claim(ns, "Filesystem", &dir)?;
    let mounted = || {
        (
            "volumeMounts",
            json!([{ "name": "data", "mountPath": "/data" }]),
        )
    };
    run(ns, "writer", "echo kept > /data/file; sync", mounted())?;
    let said = run(ns, "reader", "cat /data/file", mounted())?;
    ensure!(said == "kept", "{said:?}");
    ensure!(read(&dir.join("file"))? == "kept\n", "not on the node");
    release(ns)
}

pub fn a_disk_of_a_claim_outlives_pods(ns: &Namespace<'_>) -> Result<()> {
    const MIB: u64 = 1 << 20;
    let file = directory(ns)?.join("disk");
    File::create(&file)?.set_len(16 * MIB)?;
    let device = losetup(&["--find", "--show", &file.display().to_string()])?;
    let checked = (|| {
        claim(ns, "Block", Path::new(&device))?;
        let disk = || {
            (
                "volumeDevices",
                json!([{ "name": "data", "devicePath": "/dev/data" }]),
            )
        };
        let write = "echo kept | dd of=/dev/data bs=4096 seek=1024 conv=fsync 2>/dev/null && \
                     test -b /dev/data";
        run(ns, "writer", write, disk())?;
        let read = "dd if=/dev/data bs=4096 skip=1024 count=1 2>/dev/null | head -n 1; \
                    dd if=/dev/data bs=1M 2>/dev/null | wc -c";
        let said = run(ns, "reader", read, disk())?;
        ensure!(said == format!("kept\n{}", 16 * MIB), "{said:?}");
        release(ns)
    })();
    losetup(&["--detach", &device])?;
    checked?;
    let mut disk = Vec::new();
    File::open(&file)?.read_to_end(&mut disk)?;
    let at = 4 * usize::try_from(MIB)?;
    ensure!(
        disk[at..].starts_with(b"kept\n"),
        "not in the device's file"
    );
    Ok(())
}

fn losetup(args: &[&str]) -> Result<String> {
    let output = Command::new("losetup")
        .args(args)
        .output()
        .context("losetup")?;
    let said = output::of_success("losetup", args, &output)?;
    Ok(said.trim_end().to_owned())
}

/// Takes away what is no namespace's.
fn release(ns: &Namespace<'_>) -> Result<()> {
    ns.kubectl(&["delete", "pvc", "data", "--timeout=60s"])?;
    ns.kubectl(&["delete", "pv", &ns.name, "--timeout=60s"])?;
    ns.kubectl(&["delete", "storageclass", &ns.name])?;
    Ok(())
}
