//! Images, servers and directories for the tests.

pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod registry;

use std::{path::Path, time::Duration};

use imagesvc::{ImageService, ImageServiceConfig, RegistryConfig};

pub(crate) async fn open(root: &Path) -> ImageService {
    open_with(ImageServiceConfig::default(), root).await
}

pub(crate) async fn open_with(config: ImageServiceConfig, root: &Path) -> ImageService {
    ImageService::open(config, root).await.unwrap()
}

pub(crate) fn with_registry(name: &str, registry: RegistryConfig) -> ImageServiceConfig {
    ImageServiceConfig {
        registries: [(name.to_owned(), registry)].into(),
        ..ImageServiceConfig::default()
    }
}

/// Every file below `root`, as relative paths, but the lock.
pub(crate) fn files(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if !path.ends_with("lock") {
                let relative = path.strip_prefix(root).unwrap();
                found.push(relative.to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Waits for what happens in the background.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "not in time: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A port on which nobody listens.
pub(crate) fn closed_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
