//! A certificate authority of a test's own, by openssl.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const NEW_KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

pub struct Authority {
    dir: PathBuf,
}

/// Paths of PEM files.
pub struct Signed {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// The one whose files are in `dir`, or a new one.
    pub fn in_dir(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let authority = Self {
            dir: dir.to_owned(),
        };
        if !authority.certificate().exists() {
            authority.openssl(&format!(
                "req -x509 {NEW_KEY} -keyout ca.key -out ca.crt -days 2 -subj /CN=e2e-ca"
            ))?;
        }
        Ok(authority)
    }

    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A certificate of `subject` (as `/O=group/CN=name`) for the alternative
    /// names (as `IP:127.0.0.1,DNS:localhost`).
    pub fn sign(&self, file: &str, subject: &str, names: &str) -> Result<Signed> {
        let signed = Signed {
            certificate: self.dir.join(format!("{file}.crt")),
            key: self.dir.join(format!("{file}.key")),
        };
        if signed.certificate.exists() {
            return Ok(signed);
        }
        let extensions = self.dir.join(format!("{file}.ext"));
        fs::write(&extensions, format!("subjectAltName={names}\n"))
            .with_context(|| extensions.display().to_string())?;
        self.openssl(&format!(
            "req -new {NEW_KEY} -keyout {file}.key -out {file}.csr -subj {subject}"
        ))?;
        self.openssl(&format!(
            "x509 -req -in {file}.csr -CA ca.crt -CAkey ca.key -CAcreateserial \
             -out {file}.crt -days 2 -extfile {file}.ext"
        ))?;
        Ok(signed)
    }

    fn openssl(&self, args: &str) -> Result<()> {
        let output = Command::new("openssl")
            .args(args.split_whitespace())
            .current_dir(&self.dir)
            .output()
            .context("openssl")?;
        ensure!(
            output.status.success(),
            "openssl {args}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}
