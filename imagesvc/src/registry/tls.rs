//! Which certificates are trusted: the system's, and those of `ca_file`.

use std::{path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};

use super::RegistryError;

/// The certificates of a PEM file; at least one, each of which parses.
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| e.to_string())?;
    if certificates.is_empty() {
        return Err("it holds no certificate".into());
    }
    let mut store = RootCertStore::empty();
    for certificate in &certificates {
        store.add(certificate.clone()).map_err(|e| e.to_string())?;
    }
    Ok(certificates)
}

/// Read anew for each pull, so that a renewed file is taken up.
pub(super) fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, RegistryError> {
    let failed = |reason| RegistryError::Tls { reason };
    let mut roots = RootCertStore::empty();
    // A broken certificate among the system's is no reason to trust none.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(e.to_string()))?;
    let Some(path) = ca_file else {
        return Ok(builder.with_root_certificates(roots).with_no_client_auth());
    };
    let given = read_certificates(path)
        .map_err(|reason| failed(format!("ca_file {}: {reason}", path.display())))?;
    roots.add_parsable_certificates(given.iter().cloned());
    let verifier =
        Verifier::new(roots, given, provider).map_err(|reason| failed(reason.to_string()))?;
    Ok(builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

/// Also takes a server whose own certificate is in `ca_file`. A self-signed
/// certificate as `openssl req -x509` makes it, which Docker's documentation
/// has a registry use, is marked as an authority; rustls refuses such a one
/// from a server, Go's clients take it.
#[derive(Debug)]
struct Verifier {
    chain: Arc<WebPkiServerVerifier>,
    given: Vec<CertificateDer<'static>>,
}

impl Verifier {
    fn new(
        roots: RootCertStore,
        given: Vec<CertificateDer<'static>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, rustls::client::VerifierBuilderError> {
        let chain =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
        Ok(Self { chain, given })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.chain.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // Expiry was looked at before, and is an error of its own.
            Err(Error::InvalidCertificate(CertificateError::Other(_)))
                if self.given.iter().any(|given| given == end_entity) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;

    /// As Docker's documentation has one made.
    fn self_signed() -> Vec<CertificateDer<'static>> {
        let dir = tempfile::tempdir().unwrap();
        let cert = dir.path().join("cert.pem");
        let made = Command::new("openssl")
            .args([
                "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            ])
            .args(["-subj", "/CN=r", "-addext", "subjectAltName=DNS:r.example"])
            .arg("-keyout")
            .arg(dir.path().join("key.pem"))
            .arg("-out")
            .arg(&cert)
            .output()
            .unwrap();
        assert!(made.status.success());
        read_certificates(&cert).unwrap()
    }

    #[test]
    fn a_given_self_signed_certificate_is_taken_for_its_name_and_its_time_only() {
        let given = self_signed();
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(given.iter().cloned());
        let verifier = Verifier::new(roots, given.clone(), provider).unwrap();
        let verify = |cert: &CertificateDer<'_>, name: &'static str, now| {
            let name = ServerName::try_from(name).unwrap();
            verifier.verify_server_cert(cert, &[], &name, &[], now)
        };
        let now = UnixTime::now();
        let later = Duration::from_secs(now.as_secs() + 30 * 24 * 3600);
        let later = UnixTime::since_unix_epoch(later);
        assert!(verify(&given[0], "r.example", now).is_ok());
        assert!(verify(&given[0], "other.example", now).is_err());
        assert!(verify(&given[0], "r.example", later).is_err());
        assert!(verify(&self_signed()[0], "r.example", now).is_err());
    }
}
