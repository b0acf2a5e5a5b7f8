//! A small HTTP/1.1 server that does what a test tells it: whole answers, cut
//! ones, stalled ones. It remembers every request.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::image::TestImage;

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query.
    pub(crate) path: String,
    /// Names in lower case.
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn is_for(&self, part: &str) -> bool {
        self.path.contains(part)
    }
}

#[derive(Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// Bytes of the body after which something else happens.
    pub(crate) after: Option<(usize, Fault)>,
}

#[derive(Clone, Copy)]
pub(crate) enum Fault {
    Cut,
    Stall,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            after: None,
        }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(crate) fn after(mut self, bytes: usize, fault: Fault) -> Self {
        self.after = Some((bytes, fault));
        self
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

pub(crate) struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let handler: Arc<Handler> = Arc::new(handler);
        let task = {
            let log = Arc::clone(&log);
            tokio::spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let (log, handler) = (Arc::clone(&log), Arc::clone(&handler));
                    tokio::spawn(serve(stream, log, handler));
                }
            })
        };
        Self { address, log, task }
    }

    /// `127.0.0.1:PORT`.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// The requests whose path contains `part`.
    pub(crate) fn requests(&self, part: &str) -> Vec<Request> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|r| r.is_for(part)).cloned().collect()
    }
}

async fn serve(stream: TcpStream, log: Arc<Mutex<Vec<Request>>>, handler: Arc<Handler>) {
    // A client that hangs up in the middle is part of the tests.
    let mut stream = BufReader::new(stream);
    let Ok(Some(request)) = read_request(&mut stream).await else {
        return;
    };
    let reply = handler(&request);
    let head = request.method == "HEAD";
    log.lock().unwrap().push(request);
    let mut text = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status);
    text += &format!("content-length: {}\r\n", reply.body.len());
    for (name, value) in &reply.headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += "\r\n";
    let sent = reply.after.map_or(reply.body.len(), |(bytes, _)| bytes);
    let write = async {
        stream.write_all(text.as_bytes()).await?;
        if !head {
            stream.write_all(&reply.body[..sent]).await?;
        }
        stream.flush().await
    };
    if write.await.is_err() {
        return;
    }
    if let Some((_, Fault::Stall)) = reply.after {
        // Until the client gives up.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    }
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let len = headers
        .get("content-length")
        .map_or(0, |l| l.parse().unwrap());
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    Ok(Some(Request {
        method,
        path,
        headers,
        body: String::from_utf8(body).unwrap(),
    }))
}

/// What a well-behaved registry answers for `image`, with tag `latest`, under
/// any repository name. Ranges work.
pub(crate) fn registry_reply(image: &TestImage, request: &Request) -> Reply {
    let path = request.path.split('?').next().unwrap();
    let name = path.rsplit('/').next().unwrap();
    if path.contains("/manifests/") {
        if name != "latest" && name != image.digest() {
            return Reply::status(404);
        }
        return Reply::status(200)
            .with("content-type", image.media_type)
            .with("docker-content-digest", image.digest())
            .body(image.manifest.clone());
    }
    let blob = image.blobs().find(|(digest, _)| digest.as_str() == name);
    let Some((_, bytes)) = blob else {
        return Reply::status(404);
    };
    match request.header("range") {
        Some(range) => {
            let start = range.strip_prefix("bytes=").unwrap();
            let start: usize = start.strip_suffix('-').unwrap().parse().unwrap();
            let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
            Reply::status(206)
                .with("content-range", range)
                .body(&bytes[start..])
        }
        None => Reply::status(200).body(bytes),
    }
}
