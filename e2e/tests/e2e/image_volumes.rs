//! Images as volumes: the files of one image in a container of another.

use anyhow::{Result, ensure};
use cri_api::v1::*;
use e2e::image::Image;
use e2e::layer::{Compression, LayerBuilder};
use e2e::node::BUSYBOX;
use e2e::pod::IDLE;
use e2e::{Node, Pod};
use tonic::Code;

use crate::{refused, with_drupe};

/// Enough to be seen in how full the image store is.
const BULK: usize = 300_000;

/// Files in two layers, of which the upper hides one, and links out of it.
fn data_image() -> Result<Image> {
    let layers = vec![
        LayerBuilder::default()
            .dir("models", 0o755)?
            .file("models/weights", 0o644, b"heavy\n")?
            .file("models/old", 0o644, b"old\n")?
            .owned_file("models/alices", 0o600, 1000, b"alice\n")?
            .file("bulk", 0o644, &[7; BULK])?
            .symlink("latest", "/models")?
            .symlink("escape", "../../../../bin")?
            .build(Compression::Gzip)?,
        LayerBuilder::default()
            .file("models/.wh.old", 0o644, b"")?
            .file("models/run", 0o755, b"#!/bin/sh\necho runs\n")?
            .build(Compression::Zstd)?,
    ];
    Ok(Image::new(layers, serde_json::json!({})))
}

/// Pushes and pulls it; the id, which is what the kubelet then asks for.
fn pull_data(node: &Node) -> Result<String> {
    node.registry()?.push("data", "latest", &data_image()?)?;
    Ok(node.cri()?.pull("127.0.0.1:5000/data:latest")?)
}

fn volume(image: &str, at: &str, sub_path: &str) -> Mount {
    Mount {
        container_path: at.to_owned(),
        image: Some(ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        image_sub_path: sub_path.to_owned(),
        readonly: true,
        ..Default::default()
    }
}

fn config(pod: &Pod, name: &str, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig {
        mounts,
        ..pod.container_config(name, IDLE)
    }
}

#[test]
fn an_images_files_are_read_and_run_but_not_written() -> Result<()> {
    with_drupe(|node| {
        let image = pull_data(node)?;
        let pod = node.run_pod("volumes")?;
        let c = pod.start_with(config(
            &pod,
            "c",
            vec![
                volume(&image, "/data", ""),
                volume("127.0.0.1:5000/data:latest", "/only/models", "models"),
                volume(&image, "/linked", "latest"),
                volume(BUSYBOX, "/other", "/bin"),
            ],
        ))?;
        for dir in ["/data/models", "/only/models", "/linked"] {
            let seen = c.exec(&[
                "sh",
                "-c",
                &format!("cd {dir} && ls && cat weights && ./run && stat -c %u alices"),
            ])?;
            assert_eq!(seen, "alices\nrun\nweights\nheavy\nruns\n1000", "{dir}");
            for script in [
                "echo x > weights",
                "rm weights",
                "mkdir new",
                "chmod 600 weights",
            ] {
                let answer = c.exec_sync(&["sh", "-c", &format!("cd {dir} && {script}")], 20)?;
                let said = String::from_utf8_lossy(&answer.stderr);
                ensure!(
                    answer.exit_code != 0 && said.contains("Read-only"),
                    "{script}: {said}"
                );
            }
        }
        c.exec(&["/other/busybox", "true"])?;
        let shown = c.status()?.mounts;
        assert_eq!(shown.len(), 4);
        assert_eq!(
            shown[1].image.clone().unwrap_or_default().image,
            "127.0.0.1:5000/data:latest"
        );
        assert_eq!(shown[1].image_sub_path, "models");
        Ok(())
    })
}

#[test]
fn what_is_not_there_is_named_and_leaves_nothing() -> Result<()> {
    with_drupe(|node| {
        let image = pull_data(node)?;
        let pod = node.run_pod("missing")?;
        let create = |mount: Mount| pod.create(config(&pod, "c", vec![mount]));
        let failed = "ImageVolumeMountFailed";
        let absent = "127.0.0.1:5000/absent:latest";
        refused(
            create(volume(absent, "/data", "")),
            Code::NotFound,
            &[failed, "config.mounts[/data].image", absent],
        )?;
        for sub_path in ["nowhere", "models/nowhere", "escape", "../../bin"] {
            refused(
                create(volume(&image, "/data", sub_path)),
                Code::NotFound,
                &[failed, "/data", sub_path],
            )?;
        }
        refused(
            create(volume(&image, "/data", "models/weights")),
            Code::InvalidArgument,
            &[failed, "models/weights"],
        )?;
        let mut twice = volume(&image, "/data", "");
        twice.host_path = "/srv".to_owned();
        refused(
            create(twice),
            Code::InvalidArgument,
            &["config.mounts[/data].host_path"],
        )?;
        // Neither name nor slot was taken.
        let c = pod.start_with(config(&pod, "c", vec![volume(&image, "/data", "models")]))?;
        assert_eq!(c.exec(&["cat", "/data/weights"])?, "heavy");
        Ok(())
    })
}

#[test]
fn an_image_stays_as_long_as_a_container_has_it() -> Result<()> {
    with_drupe(|node| {
        let cri = node.cri()?;
        let before = cri.image_bytes()?;
        let image = pull_data(node)?;
        let pod = node.run_pod("held")?;
        let c = pod.start_with(config(&pod, "c", vec![volume(&image, "/data", "models")]))?;
        cri.remove(&image)?;
        ensure!(cri.find_image(&image)?.is_none());
        assert_eq!(c.exec(&["cat", "/data/weights"])?, "heavy");
        node.kill_server()?;
        node.start_server()?;
        let cri = node.cri()?;
        let kept = before + BULK as u64;
        ensure!(cri.image_bytes()? > kept, "its layers are gone");
        assert_eq!(c.exec(&["cat", "/data/weights"])?, "heavy");
        c.stop(0)?;
        ensure!(
            cri.image_bytes()? > kept,
            "its layers are gone with its end"
        );
        c.remove()?;
        ensure!(cri.image_bytes()? < kept, "its layers are left");
        Ok(())
    })
}

#[test]
fn a_container_of_more_images_than_disks_is_refused() -> Result<()> {
    with_drupe(|node| {
        let image = pull_data(node)?;
        let pod = node.run_pod("slots")?;
        let volumes = |count: usize| -> Vec<Mount> {
            (0..count)
                .map(|number| volume(&image, &format!("/data/{number}"), "models"))
                .collect()
        };
        let create = |name: &str, count| pod.create(config(&pod, name, volumes(count)));
        // A pod has eight unless the node's configuration says otherwise.
        refused(
            create("most", 8),
            Code::ResourceExhausted,
            &["disk slot", "needs 9"],
        )?;
        let all = pod.start_with(config(&pod, "all", volumes(7)))?;
        assert_eq!(all.exec(&["cat", "/data/6/weights"])?, "heavy");
        refused(
            create("more", 0),
            Code::ResourceExhausted,
            &["disk slot", "8 of them taken"],
        )?;
        // One that has ended holds none.
        all.stop(0)?;
        let next = pod.start_with(config(&pod, "next", volumes(7)))?;
        assert_eq!(next.exec(&["cat", "/data/0/weights"])?, "heavy");
        next.stop(0)?;
        next.remove()?;
        pod.start_with(config(&pod, "last", volumes(1)))?;
        Ok(())
    })
}
