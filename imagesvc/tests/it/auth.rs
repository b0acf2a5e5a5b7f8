//! Credentials and certificates.

use std::{path::Path, sync::Arc};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use imagesvc::{Auth, ErrorKind, RegistryConfig};
use serde_json::json;

use crate::support::{
    http::{Reply, Request, Server, registry_reply},
    image::{Layer, Packing, TestImage},
    open, open_with,
    registry::{Registry, push, run},
    with_registry,
};

fn image() -> TestImage {
    TestImage::new(vec![Layer::new(Packing::Gzip, &[("a", b"b")])])
}

/// A registry's storage with [`image`] as `app:latest`.
async fn stored() -> tempfile::TempDir {
    let storage = tempfile::tempdir().unwrap();
    let registry = Registry::start(storage.path(), "", "").await;
    push(&registry.host(), "app", "latest", &image()).await;
    storage
}

fn password(username: &str, password: &str) -> Auth {
    Auth {
        username: username.into(),
        password: password.into(),
        ..Auth::default()
    }
}

/// A key and a self-signed certificate for 127.0.0.1.
fn certificate(dir: &Path) -> (String, String) {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (key, cert) = (path("key.pem"), path("cert.pem"));
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=test",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            &key,
            "-out",
            &cert,
        ],
    );
    (key, cert)
}

/// As `htpasswd -Bbn user secret` prints it: bcrypt, which is all that the
/// registry takes.
const USER_SECRET: &str = "user:$2y$05$W8dvAbK1fPc0lQyY3mNsRuKYp/FV/mzVFd4FmrflwP.xVvAdV0txC\n";

#[tokio::test]
async fn basic_auth_in_both_spellings_and_refusals() {
    let storage = stored().await;
    let (root, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let table = dir.path().join("htpasswd");
    std::fs::write(&table, USER_SECRET).unwrap();
    let auth = format!("auth:\n  htpasswd: {{realm: r, path: {}}}", table.display());
    let registry = Registry::start(storage.path(), &auth, "").await;
    let name = format!("{}/app", registry.host());
    let service = open(root.path()).await;

    let encoded = Auth {
        auth: BASE64_STANDARD.encode("user:secret"),
        ..Auth::default()
    };
    let elsewhere = Auth {
        server_address: "other.example".into(),
        ..password("user", "secret")
    };
    for (auth, part) in [
        (None, "none were given"),
        (
            Some(password("user", "wrong")),
            "does not accept the credentials",
        ),
        (Some(elsewhere), "none were given"),
    ] {
        let error = service.pull(&name, auth).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(error.to_string().contains(&name), "{error}");
    }
    let broken = Auth {
        auth: "?".into(),
        ..Auth::default()
    };
    let error = service.pull(&name, Some(broken)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");

    for auth in [encoded, password("user", "secret")] {
        service.pull(&name, Some(auth)).await.unwrap();
        assert!(service.status(&name).is_some());
    }
    // Content that is here already is no way around the registry's word.
    let error = service.pull(&name, Some(password("user", "wrong"))).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Unauthorized);
}

/// A key and a certificate that the authority, the third file, has signed.
fn signed_certificate(dir: &Path, host: &str) -> (String, String, String) {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let (ca_key, ca) = certificate(dir);
    let (key, request, cert) = (path("k.pem"), path("r.pem"), path("c.pem"));
    let extensions = path("extensions");
    std::fs::write(&extensions, format!("subjectAltName={host}\n")).unwrap();
    run(
        "openssl",
        &[
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=registry",
            "-keyout",
            &key,
            "-out",
            &request,
        ],
    );
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &extensions,
            "-out",
            &cert,
        ],
    );
    (key, cert, ca)
}

#[tokio::test]
async fn a_registry_with_a_certificate_of_a_private_authority() {
    let storage = stored().await;
    for (host, good) in [("IP:127.0.0.1", true), ("IP:127.0.0.2", false)] {
        let (dir, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (key, cert, ca) = signed_certificate(dir.path(), host);
        let tls = format!("  tls: {{certificate: {cert}, key: {key}}}");
        let registry = Registry::start(storage.path(), "", &tls).await;
        let trusting = RegistryConfig {
            ca_file: Some(ca.into()),
            ..RegistryConfig::default()
        };
        let config = with_registry(&registry.host(), trusting);
        let service = open_with(config, root.path()).await;
        let result = service
            .pull(&format!("{}/app", registry.host()), None)
            .await;
        match result {
            Ok(_) => assert!(good),
            Err(error) => {
                assert!(!good, "{error}");
                assert_eq!(error.kind(), ErrorKind::Unavailable);
                assert!(error.to_string().contains("not valid for name"), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn a_registry_with_a_self_signed_certificate() {
    let storage = stored().await;
    let dir = tempfile::tempdir().unwrap();
    let (key, cert) = certificate(dir.path());
    let tls = format!("  tls: {{certificate: {cert}, key: {key}}}");
    let registry = Registry::start(storage.path(), "", &tls).await;
    let name = format!("{}/app", registry.host());

    let trusting = RegistryConfig {
        ca_file: Some(cert.into()),
        ..RegistryConfig::default()
    };
    let root = tempfile::tempdir().unwrap();
    let service = open_with(
        with_registry(&registry.host(), trusting.clone()),
        root.path(),
    )
    .await;
    service.pull(&name, None).await.unwrap();

    let strange = RegistryConfig {
        plain_http: Some(false),
        ..RegistryConfig::default()
    };
    let root = tempfile::tempdir().unwrap();
    let service = open_with(with_registry(&registry.host(), strange), root.path()).await;
    let error = service.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("certificate"), "{error}");

    let mirror = RegistryConfig {
        mirrors: vec![format!("https://{}", registry.host())],
        ..RegistryConfig::default()
    };
    let mut config = with_registry("a.invalid", mirror);
    config.registries.insert(registry.host(), trusting);
    let root = tempfile::tempdir().unwrap();
    let service = open_with(config, root.path()).await;
    service.pull("a.invalid/app", None).await.unwrap();
}

/// Signs tokens as docker-registry's `auth: token` wants them.
struct TokenIssuer {
    key: String,
    cert: String,
}

impl TokenIssuer {
    fn token(&self) -> String {
        let pem = std::fs::read_to_string(&self.cert).unwrap();
        let der: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
        let access = json!([{"type": "repository", "name": "app", "actions": ["pull"]}]);
        let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
        let claims = json!({
            "iss": "issuer", "sub": "user", "aud": "registry", "jti": "1",
            "nbf": 0, "iat": 0, "exp": 4_000_000_000_u64, "access": access,
        });
        let encode = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
        let signed = format!(
            "{}.{}",
            encode(header.to_string().as_bytes()),
            encode(claims.to_string().as_bytes())
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &signed).unwrap();
        let path = file.path().to_str().unwrap();
        let signature = run("openssl", &["dgst", "-sha256", "-sign", &self.key, path]);
        format!("{signed}.{}", encode(&signature))
    }

    /// The token server: a password, a refresh token, nothing else.
    fn answer(&self, request: &Request) -> Reply {
        let basic = format!("Basic {}", BASE64_STANDARD.encode("user:secret"));
        let allowed = match request.method.as_str() {
            "GET" => {
                request.header("authorization") == Some(&basic)
                    && request.is_for("scope=repository%3Aapp%3Apull")
                    && request.is_for("service=registry")
            }
            "POST" => {
                request.header("authorization").is_none()
                    && request.body.contains("grant_type=refresh_token")
                    && request.body.contains("refresh_token=identity")
            }
            _ => false,
        };
        if !allowed {
            return Reply::status(401).body(r#"{"details":"incorrect username or password"}"#);
        }
        let field = if request.method == "GET" {
            "token"
        } else {
            "access_token"
        };
        Reply::status(200).body(json!({field: self.token()}).to_string())
    }
}

#[tokio::test]
async fn bearer_tokens_for_a_password_for_an_identity_token_and_given_ready_made() {
    let storage = stored().await;
    let dir = tempfile::tempdir().unwrap();
    let (key, cert) = certificate(dir.path());
    let issuer = Arc::new(TokenIssuer { key, cert });
    let tokens = {
        let issuer = Arc::clone(&issuer);
        Server::start(move |request| issuer.answer(request)).await
    };
    let auth = format!(
        "auth:\n  token:\n    realm: http://{}/token\n    service: registry\n    \
         issuer: issuer\n    rootcertbundle: {}",
        tokens.host(),
        issuer.cert
    );
    let registry = Registry::start(storage.path(), &auth, "").await;
    let name = format!("{}/app", registry.host());

    let identity = Auth {
        identity_token: "identity".into(),
        ..Auth::default()
    };
    let ready = Auth {
        registry_token: issuer.token(),
        ..Auth::default()
    };
    for auth in [password("user", "secret"), identity, ready] {
        let root = tempfile::tempdir().unwrap();
        let service = open(root.path()).await;
        service.pull(&name, Some(auth)).await.unwrap();
    }
    // One token serves the whole pull.
    assert_eq!(tokens.requests("/token").len(), 2);

    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let forged = Auth {
        registry_token: "forged".into(),
        ..Auth::default()
    };
    for (auth, part) in [
        (
            Some(password("user", "wrong")),
            "incorrect username or password",
        ),
        (Some(forged), "does not accept the registry token"),
        (None, "token server"),
    ] {
        let error = service.pull(&name, auth).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let image = image();
    let storage = {
        let image = image.clone();
        Server::start(move |request| registry_reply(&image, request)).await
    };
    let basic = format!("Basic {}", BASE64_STANDARD.encode("user:secret"));
    let registry = {
        let (image, elsewhere) = (image.clone(), storage.host());
        Server::start(move |request| {
            if request.header("authorization") != Some(&basic) {
                return Reply::status(401).with("www-authenticate", "Basic realm=\"r\"");
            }
            if request.is_for("/blobs/") {
                let there = format!("http://{elsewhere}{}", request.path);
                return Reply::status(307).with("location", there);
            }
            registry_reply(&image, request)
        })
        .await
    };
    let root = tempfile::tempdir().unwrap();
    let service = open(root.path()).await;
    let name = format!("{}/app", registry.host());
    service
        .pull(&name, Some(password("user", "secret")))
        .await
        .unwrap();
    let strayed = storage.requests("");
    assert_eq!(strayed.len(), 2);
    assert!(strayed.iter().all(|r| r.header("authorization").is_none()));
}
