//! Requests, answers, tokens.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{exec, forward, server, soon};
use crate::streaming::hostile::Pods;

/// The connection after the request, and the answer's head.
pub async fn request(url: &str, headers: &[(&str, &str)]) -> (TcpStream, String) {
    let (address, path) = url
        .strip_prefix("http://")
        .unwrap()
        .split_once('/')
        .unwrap();
    let mut io = TcpStream::connect(address).await.unwrap();
    let mut text = format!("POST /{path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    io.write_all((text + "\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(io.read_u8()).await.unwrap());
    }
    (io, String::from_utf8(head).unwrap())
}

pub async fn spdy(url: &str, version: &str) -> TcpStream {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", version),
    ];
    let (io, head) = request(url, &headers).await;
    let head = head.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
    assert!(head.contains("\r\nupgrade: spdy/3.1\r\n"), "{head}");
    assert!(
        head.contains(&format!("\r\nx-stream-protocol-version: {version}\r\n")),
        "{head}"
    );
    io
}

pub async fn websocket(url: &str, protocol: &str) -> super::websocket::Client {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", protocol),
    ];
    let (io, head) = request(url, &headers).await;
    let lower = head.to_ascii_lowercase();
    assert!(lower.starts_with("http/1.1 101 "), "{head}");
    assert!(lower.contains("\r\nconnection: upgrade\r\n"), "{head}");
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    let named = format!("sec-websocket-protocol: {protocol}\r\n").to_ascii_lowercase();
    assert!(lower.contains(&named), "{head}");
    super::websocket::Client { io }
}

fn code(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_token_opens_its_own_address_once() {
    let server = server(&Pods::default()).await;
    let upgrade = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
    ];
    let url = server.exec(exec(&["cat"], "io")).unwrap();
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    // What fails before the upgrade leaves the token for another try.
    assert_eq!(code(&request(&url, &[]).await.1), 400);
    let other = [upgrade[0], upgrade[1], ("X-Stream-Protocol-Version", "v7")];
    let (_, head) = request(&url, &other).await;
    assert_eq!(code(&head), 403);
    assert!(head.contains("v4.channel.k8s.io"), "{head}");
    assert_eq!(code(&request(&url, &upgrade).await.1), 101);
    assert_eq!(code(&request(&url, &upgrade).await.1), 404);

    let attach = url.replace("/exec/", "/attach/");
    assert_eq!(code(&request(&attach, &upgrade).await.1), 404);
    let forwarded = server.port_forward(forward(&[])).unwrap();
    let wrong = forwarded.replace("/portforward/", "/exec/");
    assert_eq!(code(&request(&wrong, &upgrade).await.1), 404);
    let guess = format!("{}x", forwarded);
    let ports = [
        upgrade[0],
        upgrade[1],
        ("X-Stream-Protocol-Version", "portforward.k8s.io"),
    ];
    assert_eq!(code(&request(&guess, &ports).await.1), 404);
}

#[tokio::test]
async fn tls_serves_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
    let made = std::process::Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args([
            "-subj",
            "/CN=node",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ])
        .args(["-addext", "basicConstraints=CA:FALSE"])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output()
        .unwrap();
    assert!(made.status.success());
    let files = crate::streaming::TlsFiles {
        cert: cert.clone(),
        key,
    };
    let config = crate::streaming::StreamingConfig {
        tls: Some(files),
        ..Default::default()
    };
    let server = crate::streaming::Streaming::start(&config, Pods::default())
        .await
        .unwrap();
    let url = server.exec(exec(&["cat"], "io")).unwrap();
    let address = url.strip_prefix("https://").unwrap();
    let (address, path) = address.split_once('/').unwrap();

    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(&cert).unwrap())
        .unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(client));
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut io = soon(connector.connect(name, tcp)).await.unwrap();
    let text = format!(
        "POST /{path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    );
    io.write_all(text.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(io.read_u8()).await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    let mut client = super::spdy::Client::new(io);
    let [error, stdin, stdout] = [
        client.open("error").await,
        client.open("stdin").await,
        client.open("stdout").await,
    ];
    client.data(stdin, b"secret").await;
    client.fin(stdin).await;
    let all = client.until_ended(&[error, stdout]).await;
    assert_eq!(all.text(stdout), "secret");

    let broken = crate::streaming::StreamingConfig {
        tls: Some(crate::streaming::TlsFiles {
            cert: "/nowhere".into(),
            key: cert,
        }),
        ..Default::default()
    };
    let refused = crate::streaming::Streaming::start(&broken, Pods::default()).await;
    assert!(refused.err().unwrap().to_string().contains("/nowhere"));
}
