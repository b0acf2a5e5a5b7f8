//! Equivalents of the images that critest v1.36 names, made of Debian packages
//! and served under the same repositories and tags. The registries that
//! critest names with them are mirrored by the node's own.

use anyhow::Result;
use serde_json::{Value, json};

use crate::artifacts::deb;
use crate::image::{Image, architecture, pause};
use crate::layer::{Compression, Layer, LayerBuilder};
use crate::registry::Registry;

/// Repositories of Kubernetes' test images and of critest's own.
const OF_KUBERNETES: &str = "e2e-test-images";
const OF_CRITEST: &str = "k8s-staging-cri-tools";

/// Where critest expects the web server of a pod on the host's network.
const HOST_NETWORK_PORT: u16 = 12003;

/// Pushes every image that critest pulls.
pub fn push(registry: &Registry) -> Result<()> {
    let base = base()?;
    let busybox = image(&base, vec![], json!({ "Cmd": ["sh"] }));
    let kubernetes = |name: &str, tag: &str, image: &Image| {
        registry
            .push(&format!("{OF_KUBERNETES}/{name}"), tag, image)
            .map(drop)
    };
    let critest = |name: &str, tag: &str, image: &Image| {
        registry
            .push(&format!("{OF_CRITEST}/{name}"), tag, image)
            .map(drop)
    };

    // Another image than the one that containerd's pods wait in.
    let mut waiting = pause()?;
    waiting.config["Labels"] = json!({ "of": "critest" });
    registry.push("pause", "3.9", &waiting)?;
    kubernetes("busybox", "1.29-2", &busybox)?;
    let nginx_files = nginx_files()?;
    kubernetes("nginx", "1.14-2", &nginx(&base, &nginx_files, 80)?)?;
    kubernetes("httpd", "2.4.39-4", &httpd(&base)?)?;
    kubernetes("nonewprivs", "1.3", &no_new_privs()?)?;

    critest(
        &format!("hostnet-nginx-{}", architecture()),
        "latest",
        &nginx(&base, &nginx_files, HOST_NETWORK_PORT)?,
    )?;
    for (name, user) in [
        ("test-image-user-uid", "1002"),
        ("test-image-user-username", "www-data"),
        ("test-image-user-uid-group", "1003:1004"),
        ("test-image-user-username-group", "www-data:1004"),
    ] {
        let config = json!({ "Cmd": ["sh"], "User": user });
        critest(name, "latest", &image(&base, vec![], config))?;
    }
    critest(
        "test-image-predefined-group",
        "latest",
        &predefined_group(&base)?,
    )?;
    for (name, tags) in [
        ("test-image-1", &["latest"][..]),
        ("test-image-2", &["latest"]),
        ("test-image-3", &["latest"]),
        ("test-image-latest", &["latest"]),
        // critest asks for a digest of this one, which only the original has.
        ("test-image-digest", &["latest"]),
    ] {
        for tag in tags {
            critest(name, tag, &marked(&base, name)?)?;
        }
    }
    for tag in ["test", "all"] {
        critest("test-image-tag", tag, &marked(&base, tag)?)?;
    }
    let same = marked(&base, "same-image")?;
    for tag in ["1", "2", "3"] {
        critest("test-image-tags", tag, &same)?;
    }
    Ok(())
}

/// `base` and `layers` with the members of `config`.
fn image(base: &Layer, layers: Vec<Layer>, config: Value) -> Image {
    let mut whole = json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
    });
    if let (Some(whole), Value::Object(config)) = (whole.as_object_mut(), config) {
        whole.extend(config);
    }
    let layers = [vec![base.clone()], layers].concat();
    Image::new(layers, whole)
}

/// A file system with busybox, a C library and a few accounts.
fn base() -> Result<Layer> {
    let mut layer = LayerBuilder::default()
        .package(&deb("busybox")?)?
        // Without what converts between character sets, which is most of it.
        .package_files(&deb("libc6")?, |path| {
            path.starts_with("lib") || path.starts_with("lib64")
        })?
        .package_files(&deb("util-linux")?, |path| path.ends_with("usr/bin/ipcs"))?
        // What Debian's busybox has not.
        .file("bin/pgrep", 0o755, b"#!/bin/sh\nexec pidof \"$@\"\n")?;
    for dir in [
        "dev",
        "etc",
        "home",
        "proc",
        "root",
        "sys",
        "usr/local",
        "var",
        "var/run",
    ] {
        layer = layer.dir(dir, 0o755)?;
    }
    layer = layer.dir("tmp", 0o1777)?;
    // A path is masked by a mount, which a symbolic link would lead to busybox
    // itself.
    for applet in APPLETS {
        layer = layer.hardlink(&format!("bin/{applet}"), "bin/busybox", 0o755)?;
    }
    layer
        .file("etc/passwd", 0o644, PASSWD.as_bytes())?
        .file("etc/group", 0o644, GROUP.as_bytes())?
        .build(Compression::Gzip)
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                      www-data:x:33:33:www-data:/var/www:/bin/false\n\
                      nobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n";

/// Names of the applets that critest, and the scripts in it, call.
const APPLETS: &[&str] = &[
    "brctl", "cat", "chmod", "dd", "echo", "env", "false", "grep", "hostname", "id", "ls", "mkdir",
    "mount", "nc", "netstat", "pidof", "ping", "ps", "rm", "sh", "sleep", "stat", "test", "top",
    "touch", "true", "umount", "uname", "wget",
];

/// An image that differs from others by a file.
fn marked(base: &Layer, name: &str) -> Result<Image> {
    let mark = LayerBuilder::default()
        .file(name, 0o644, b"")?
        .build(Compression::Gzip)?;
    Ok(image(base, vec![mark], json!({ "Cmd": ["sh"] })))
}

/// Its user belongs to a group by /etc/group alone.
fn predefined_group(base: &Layer) -> Result<Image> {
    let passwd = format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n");
    let group =
        format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n");
    let accounts = LayerBuilder::default()
        .file("etc/passwd", 0o644, passwd.as_bytes())?
        .file("etc/group", 0o644, group.as_bytes())?
        .build(Compression::Gzip)?;
    let config = json!({ "Cmd": ["sh"], "User": "1000" });
    Ok(image(base, vec![accounts], config))
}

/// nginx that serves a page on `port`, with the shell of other images.
pub fn nginx_alone(port: u16) -> Result<Image> {
    nginx(&base()?, &nginx_files()?, port)
}

fn nginx_files() -> Result<Layer> {
    let mut layer = LayerBuilder::default();
    for package in ["libcrypt1", "libpcre2-8-0", "libssl3", "nginx", "zlib1g"] {
        layer = layer.package(&deb(package)?)?;
    }
    for dir in ["var/lib/nginx", "var/log/nginx", "var/www"] {
        layer = layer.dir(dir, 0o755)?;
    }
    layer
        .file("var/www/index.html", 0o644, b"Welcome to nginx!\n")?
        .build(Compression::Gzip)
}

fn nginx(base: &Layer, files: &Layer, port: u16) -> Result<Image> {
    let config = format!(
        "user nobody nogroup;\n\
         worker_processes 1;\n\
         pid /var/run/nginx.pid;\n\
         error_log stderr notice;\n\
         events {{ worker_connections 256; }}\n\
         http {{\n    access_log /dev/stdout;\n    server {{\n        listen {port};\n        root /var/www;\n    }}\n}}\n"
    );
    let layer = LayerBuilder::default()
        .file("etc/nginx/nginx.conf", 0o644, config.as_bytes())?
        .build(Compression::Gzip)?;
    Ok(image(
        base,
        vec![files.clone(), layer],
        json!({
            "Cmd": ["nginx", "-g", "daemon off;"],
            "ExposedPorts": { format!("{port}/tcp"): {} },
            "StopSignal": "SIGQUIT",
        }),
    ))
}

/// critest looks for the server's name in its log.
fn httpd(base: &Layer) -> Result<Image> {
    let config = "ServerRoot /usr\n\
                  ServerName localhost\n\
                  Listen 80\n\
                  LoadModule mpm_prefork_module lib/apache2/modules/mod_mpm_prefork.so\n\
                  LoadModule authz_core_module lib/apache2/modules/mod_authz_core.so\n\
                  LoadModule dir_module lib/apache2/modules/mod_dir.so\n\
                  User www-data\n\
                  Group www-data\n\
                  StartServers 1\n\
                  MaxRequestWorkers 8\n\
                  PidFile /var/run/httpd.pid\n\
                  DocumentRoot /var/www\n\
                  DirectoryIndex index.html\n\
                  ErrorLog /proc/self/fd/2\n";
    const MODULES: &[&str] = &["mod_mpm_prefork.so", "mod_authz_core.so", "mod_dir.so"];
    let mut layer = LayerBuilder::default().package_files(&deb("apache2-bin")?, |path| {
        path.ends_with("usr/sbin/apache2") || MODULES.iter().any(|module| path.ends_with(module))
    })?;
    for package in [
        "libapr1",
        "libaprutil1",
        "libcrypt1",
        "libexpat1",
        "libpcre2-8-0",
        "libuuid1",
    ] {
        layer = layer.package(&deb(package)?)?;
    }
    let layer = layer
        .symlink("usr/sbin/httpd", "apache2")?
        .dir("var/www", 0o755)?
        .file("var/www/index.html", 0o644, b"It works!\n")?
        .file("etc/httpd.conf", 0o644, config.as_bytes())?
        .build(Compression::Gzip)?;
    Ok(image(
        base,
        vec![layer],
        json!({
            "Cmd": ["httpd", "-f", "/etc/httpd.conf", "-D", "FOREGROUND"],
            "ExposedPorts": { "80/tcp": {} },
            "StopSignal": "SIGWINCH",
        }),
    ))
}

/// A set-user-id program that says which user it is.
fn no_new_privs() -> Result<Image> {
    let bash = crate::debian::file(&deb("bash-static")?, "bin/bash-static")?;
    let layer = LayerBuilder::default()
        .file("nnp", 0o4755, &bash)?
        .dir("proc", 0o555)?
        .dir("sys", 0o555)?
        .dir("dev", 0o755)?
        .dir("etc", 0o755)?
        .build(Compression::Gzip)?;
    // With -p it keeps the user that it was given.
    let command = json!(["/nnp", "-p", "-c", "echo \"Effective uid: $EUID\""]);
    Ok(Image::new(vec![layer], json!({ "Cmd": command })))
}
