//! A container's log holds exactly what it wrote.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::ReopenContainerLogRequest;
use e2e::log::{self, Stream};
use e2e::{eventually, layer};
use tonic::Code;

use crate::{refused, shares_the_hosts_kernel, with_drupe, with_node};

#[test]
fn a_log_of_100_mb_is_byte_exact() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("loud")?;
        // Lines of all lengths, some longer than any buffer on the way.
        let script = "head -c 75000000 /dev/urandom | base64 -w 0 | fold_long | tee /dev/fd/3 | sha256sum >&2";
        let script = script.replace("fold_long", "awk 'BEGIN { RS = \"A\" } { print }'");
        let container = pod.start("c", &["sh", "-c", &format!("exec 3>&1; {script}")])?;
        let status = container.wait_exit_within(Duration::from_secs(300))?;
        assert_eq!(status.exit_code, 0);
        let records = log::read(&container.log)?;
        let stdout = log::written(&records, Stream::Stdout);
        ensure!(stdout.len() >= 100_000_000, "only {} bytes", stdout.len());
        let stderr = String::from_utf8(log::written(&records, Stream::Stderr))?;
        let sum = layer::digest(&stdout).replace("sha256:", "");
        ensure!(
            stderr.starts_with(&sum),
            "the log's sum is {sum}, the container's {stderr}"
        );
        Ok(())
    })
}

#[test]
fn a_last_line_without_an_end_is_kept_as_partial() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("unfinished")?;
        let container = pod.start("c", &["printf", "whole\\npart"])?;
        container.wait_exit()?;
        let records = log::read(&container.log)?;
        let lines: Vec<_> = records
            .iter()
            .map(|r| (r.partial, r.content.as_slice()))
            .collect();
        // containerd ends the last line.
        let last = (!shares_the_hosts_kernel(node), b"part".as_slice());
        ensure!(lines == [(false, b"whole".as_slice()), last], "{lines:?}");
        Ok(())
    })
}

#[test]
fn binary_and_very_long_lines_are_kept() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("binary")?;
        // containerd takes a carriage return for a part of the line's end.
        let end = if shares_the_hosts_kernel(node) {
            ""
        } else {
            "\r"
        };
        let script = format!(
            "printf '\\000\\001\\377{end}\\n\\n \\n'; head -c 1000000 /dev/zero | tr '\\0' x; echo"
        );
        let container = pod.start("c", &["sh", "-c", &script])?;
        container.wait_exit()?;
        let records = log::read(&container.log)?;
        let mut expected = b"\x00\x01\xff".to_vec();
        expected.extend(format!("{end}\n\n \n").bytes());
        expected.extend(std::iter::repeat_n(b'x', 1_000_000));
        expected.push(b'\n');
        ensure!(
            log::written(&records, Stream::Stdout) == expected,
            "the bytes differ"
        );
        let longest = records
            .iter()
            .map(|record| record.content.len())
            .max()
            .context("no records")?;
        ensure!(
            longest <= 32 * 1024,
            "a record of {longest} bytes is more than log readers take"
        );
        Ok(())
    })
}

#[test]
fn both_streams_are_told_apart() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("streams")?;
        let container = pod.start("c", &["sh", "-c", "echo out; echo err >&2"])?;
        container.wait_exit()?;
        let records = log::read(&container.log)?;
        assert_eq!(log::written(&records, Stream::Stdout), b"out\n");
        assert_eq!(log::written(&records, Stream::Stderr), b"err\n");
        Ok(())
    })
}

#[test]
fn a_log_can_be_rotated_while_it_is_written_without_losing_a_line() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("rotated")?;
        let container = pod.start(
            "c",
            &[
                "sh",
                "-c",
                "n=0; while [ $n -lt 20000 ]; do echo line $n; n=$((n+1)); done",
            ],
        )?;
        let old = container.log.with_extension("old");
        eventually("the log to grow", Duration::from_secs(20), || {
            let length = fs::metadata(&container.log).map_or(0, |metadata| metadata.len());
            ensure!(length > 50_000, "{length} bytes");
            Ok::<_, anyhow::Error>(())
        })?;
        fs::rename(&container.log, &old)?;
        node.cri()?
            .reopen_container_log(ReopenContainerLogRequest {
                container_id: container.id.clone(),
            })?;
        ensure!(
            container.log.exists(),
            "no new log file after ReopenContainerLog"
        );
        container.wait_exit()?;
        let mut written = log::written(&log::read(&old)?, Stream::Stdout);
        ensure!(
            written.len() < 200_000,
            "all was written before the rotation"
        );
        written.extend(log::written(&log::read(&container.log)?, Stream::Stdout));
        let expected: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
        ensure!(
            written == expected.as_bytes(),
            "{} bytes instead of {}",
            written.len(),
            expected.len()
        );
        Ok(())
    })
}

#[test]
fn crictl_logs_shows_what_the_container_wrote() -> Result<()> {
    with_node(|node| {
        let pod = node.run_pod("logs")?;
        let container = pod.start("c", &["sh", "-c", "echo one; echo two"])?;
        container.wait_exit()?;
        assert_eq!(node.crictl_ok(&["logs", &container.id])?, "one\ntwo");
        Ok(())
    })
}

#[test]
fn a_log_in_whose_place_is_a_link_is_not_written() -> Result<()> {
    with_drupe(|node| {
        let pod = node.run_pod("linked")?;
        // As a pod with a volume of /var/log could put it there.
        let crontab = node.dir.join("crontab");
        fs::write(&crontab, "")?;
        let config = pod.container_config("c", &["echo", "* * * * * root id"]);
        let log = Path::new(&pod.config.log_directory).join(&config.log_path);
        std::os::unix::fs::symlink(&crontab, &log)?;
        let parts = ["c.log", "symbolic link", "remove it"];
        let answer = pod.create(config.clone());
        refused(answer, Code::FailedPrecondition, &parts)?;
        assert_eq!(fs::read_to_string(&crontab)?, "");
        fs::remove_file(&log)?;
        let container = pod.start_with(config)?;
        container.wait_exit()?;
        ensure!(!log::read(&container.log)?.is_empty(), "nothing was logged");
        Ok(())
    })
}
