//! Holds `docs/configuration.md` to the configuration: the same keys, the same
//! defaults. In its tables a key of a map stands as `NAME` or `HOST`.

use std::collections::BTreeMap;

use imagesvc::RegistryConfig;
use podsandbox::config::RuntimeConfig;
use serde_norway::Value;

use super::Config;
use crate::streaming::TlsFiles;

const PAGE: &str = include_str!("../../../docs/configuration.md");

/// Who uses them has to name both: they have no default.
const WITHOUT_DEFAULT: [&str; 2] = ["streaming.tls.cert", "streaming.tls.key"];

/// Every key there is, with its default.
fn keys() -> BTreeMap<String, Value> {
    let mut config = Config {
        runtimes: BTreeMap::from([("NAME".to_owned(), RuntimeConfig::default())]),
        ..Config::default()
    };
    let registry = ("HOST".to_owned(), RegistryConfig::default());
    config.images.registries = BTreeMap::from([registry]);
    config.streaming.tls = Some(TlsFiles {
        cert: "".into(),
        key: "".into(),
    });
    let mut keys = BTreeMap::new();
    flatten("", serde_norway::to_value(config).unwrap(), &mut keys);
    keys
}

fn flatten(path: &str, value: Value, keys: &mut BTreeMap<String, Value>) {
    let Value::Mapping(members) = value else {
        keys.insert(path.to_owned(), value);
        return;
    };
    for (key, value) in members {
        let key = key.as_str().unwrap();
        let below = if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        };
        flatten(&below, value, keys);
    }
}

/// The page's rows that begin with a key: the key and its default.
fn rows() -> Vec<(&'static str, &'static str)> {
    let rows = PAGE.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        (cells[1].trim_matches('`'), cells[3])
    })
    .collect()
}

#[test]
fn the_page_names_every_key_once_and_no_other() {
    let mut named: Vec<&str> = rows().into_iter().map(|(key, _)| key).collect();
    named.sort_unstable();
    let keys = keys();
    let keys: Vec<&str> = keys.keys().map(String::as_str).collect();
    assert_eq!(named, keys);
}

#[test]
fn the_page_tells_the_defaults() {
    let keys = keys();
    for (key, told) in rows() {
        if WITHOUT_DEFAULT.contains(&key) {
            assert_eq!(told, "none", "{key}");
            continue;
        }
        let yaml = told.trim_matches('`');
        assert_ne!(yaml, told, "{key}: the default is not in backquotes");
        let told: Value = serde_norway::from_str(yaml).unwrap();
        assert_eq!(told, keys[key], "{key}");
    }
}
