//! Debian's docker-registry on the node's own loopback, and pushing to it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::certificates::Authority;
use crate::cgroup::Cgroup;
use crate::guard::Guard;
use crate::image::{Image, Manifest};
use crate::layer::digest;
use crate::netns::NetNs;
use crate::{eventually, http, reaper};

/// Where the plain registry of every node listens, in the node's network.
pub const ADDRESS: &str = "127.0.0.1:5000";

const START_WITHIN: Duration = Duration::from_secs(20);

/// Account of a registry that asks for one; the hash is bcrypt of the password.
pub const USER: &str = "puller";
pub const PASSWORD: &str = "correct horse battery staple";
const HTPASSWD: &str = "puller:$2y$04$4taMGRPnVGEYRG35imUFqO/7./OXLUjjlTUJ8TpZ411Tl8bEw6lU6\n";

/// What sets a registry apart from the plain one. All share one storage, so
/// that what is pushed to the plain one can be pulled from any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    Plain,
    /// Basic authentication with [`USER`] and [`PASSWORD`].
    Basic,
    /// HTTPS with a certificate that [`Registry::certificate_authority`] signed.
    Tls,
}

pub struct Registry {
    process: Child,
    _guard: Guard,
    pub address: String,
    netns: Arc<NetNs>,
    dir: PathBuf,
}

impl Registry {
    /// Starts a registry at `address` whose storage is `dir/storage`.
    pub fn start(
        dir: &Path,
        netns: &Arc<NetNs>,
        cgroup: &Arc<Cgroup>,
        address: &str,
        access: &Access,
    ) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let name = format!("registry-{}", address.replace(':', "-"));
        let config = dir.join(format!("{name}.yml"));
        fs::write(&config, configuration(dir, address, access)?)
            .with_context(|| config.display().to_string())?;
        let log = File::create(dir.join(format!("{name}.log"))).context("registry log")?;
        let mut command = Command::new("docker-registry");
        command
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = reaper::spawn_own(cgroup, || {
            netns.run(|| command.spawn().context("docker-registry"))
        })?;
        let guard = Guard::of_process(process.id(), &config)?;
        let mut registry = Self {
            process,
            _guard: guard,
            address: address.to_owned(),
            netns: netns.clone(),
            dir: dir.to_owned(),
        };
        eventually("the registry to listen", START_WITHIN, || {
            if let Some(status) = registry.process.try_wait()? {
                anyhow::bail!("it ended: {status}");
            }
            netns.run(|| Ok(std::net::TcpStream::connect(address)?))
        })?;
        Ok(registry)
    }

    /// Pushes `image` as `repository:tag`; returns the manifest's digest.
    pub fn push(&self, repository: &str, tag: &str, image: &Image) -> Result<String> {
        for layer in &image.layers {
            self.push_blob(repository, &layer.blob)?;
        }
        self.push_blob(repository, &image.config_bytes())?;
        self.push_manifest(repository, tag, &image.manifest())
    }

    /// Pushes a manifest whose blobs, or an index whose manifests, are there.
    pub fn push_manifest(
        &self,
        repository: &str,
        reference: &str,
        manifest: &Manifest,
    ) -> Result<String> {
        let path = format!("/v2/{repository}/manifests/{reference}");
        let response = self.netns.run(|| {
            let headers = [("Content-Type", manifest.media_type)];
            http::request(&self.address, "PUT", &path, &headers, &manifest.bytes)
        })?;
        ensure!(
            response.status == 201,
            "push {repository}:{reference}: {} {}",
            response.status,
            String::from_utf8_lossy(&response.body)
        );
        Ok(manifest.digest())
    }

    fn push_blob(&self, repository: &str, blob: &[u8]) -> Result<()> {
        let digest = digest(blob);
        self.netns.run(|| {
            let head = http::request(
                &self.address,
                "HEAD",
                &format!("/v2/{repository}/blobs/{digest}"),
                &[],
                &[],
            )?;
            if head.status == 200 {
                return Ok(());
            }
            let begun = http::request(
                &self.address,
                "POST",
                &format!("/v2/{repository}/blobs/uploads/"),
                &[],
                &[],
            )?;
            ensure!(
                begun.status == 202,
                "begin the upload of a blob: {}",
                begun.status
            );
            let location = begun
                .header("Location")
                .context("no Location for the upload")?;
            let path = location
                .split_once(&self.address)
                .map_or(location, |(_, path)| path);
            let separator = if path.contains('?') { '&' } else { '?' };
            let path = format!("{path}{separator}digest={digest}");
            let headers = [("Content-Type", "application/octet-stream")];
            let done = http::request(&self.address, "PUT", &path, &headers, blob)?;
            ensure!(done.status == 201, "upload a blob: {}", done.status);
            Ok(())
        })
    }

    /// Changes one byte in the middle of a stored blob, its length kept.
    pub fn corrupt_blob(&self, digest: &str) -> Result<()> {
        let path = self.blob_path(digest)?;
        let mut bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(&path, bytes).with_context(|| path.display().to_string())
    }

    fn blob_path(&self, digest: &str) -> Result<PathBuf> {
        let hex = digest
            .strip_prefix("sha256:")
            .context("not a sha256 digest")?;
        let blobs = self.dir.join("storage/docker/registry/v2/blobs/sha256");
        Ok(blobs.join(&hex[..2]).join(hex).join("data"))
    }

    /// The CA that signs the certificates of registries with [`Access::Tls`].
    #[must_use]
    pub fn certificate_authority(dir: &Path) -> PathBuf {
        dir.join("tls/ca.crt")
    }

    /// Whether `pid` is this registry's.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Already gone is fine.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn configuration(dir: &Path, address: &str, access: &Access) -> Result<String> {
    let storage = dir.join("storage");
    let mut config = format!(
        "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: {address}\n  secret: e2e\n",
        storage.display()
    );
    match access {
        Access::Plain => {}
        Access::Basic => {
            let htpasswd = dir.join("htpasswd");
            fs::write(&htpasswd, HTPASSWD).with_context(|| htpasswd.display().to_string())?;
            config.push_str(&format!(
                "auth:\n  htpasswd:\n    realm: e2e\n    path: {}\n",
                htpasswd.display()
            ));
        }
        Access::Tls => {
            let names = "IP:127.0.0.1,DNS:localhost";
            let signed =
                Authority::in_dir(&dir.join("tls"))?.sign("registry", "/CN=registry", names)?;
            config.push_str(&format!(
                "  tls:\n    certificate: {}\n    key: {}\n",
                signed.certificate.display(),
                signed.key.display()
            ));
        }
    }
    Ok(config)
}
