use super::*;

const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

fn other_architecture() -> &'static str {
    if Platform::host().architecture == "amd64" {
        "arm64"
    } else {
        "amd64"
    }
}

fn manifest(media_type: &str, config: &str, layer: &str) -> String {
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{media_type}",
            "config":{{"mediaType":"{config}","digest":"{A}","size":2}},
            "layers":[{{"mediaType":"{layer}","digest":"{B}","size":3}}]}}"#
    )
}

fn parse_error(json: &str) -> ManifestError {
    match parse(json.as_bytes(), "") {
        Err(error) => error,
        Ok(_) => panic!("accepted: {json}"),
    }
}

#[test]
fn oci_and_docker_manifests_are_read() {
    for (kind, config, layer, compression) in [
        (
            OCI_MANIFEST,
            OCI_CONFIG,
            "application/vnd.oci.image.layer.v1.tar+zstd",
            Compression::Zstd,
        ),
        (
            OCI_MANIFEST,
            OCI_CONFIG,
            "application/vnd.oci.image.layer.v1.tar",
            Compression::None,
        ),
        (
            DOCKER_MANIFEST,
            DOCKER_CONFIG,
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            Compression::Gzip,
        ),
    ] {
        let json = manifest(kind, config, layer);
        for header in [kind, "application/json; charset=utf-8", ""] {
            let Ok(Parsed::Image(manifest)) = parse(json.as_bytes(), header) else {
                panic!("{json}");
            };
            assert_eq!(manifest.config.digest.as_str(), A);
            assert_eq!(manifest.layers[0].blob.size, 3);
            assert_eq!(manifest.layers[0].compression, compression);
        }
    }
}

#[test]
fn an_index_yields_this_platform_and_not_an_attestation() {
    let host = Platform::host().architecture;
    let other = other_architecture();
    let json = format!(
        r#"{{"schemaVersion":2,"manifests":[
            {{"digest":"{B}","size":1,"platform":{{"os":"linux","architecture":"{other}"}}}},
            {{"digest":"{B}","size":1,"platform":{{"os":"unknown","architecture":"unknown"}}}},
            {{"digest":"{A}","size":1,"platform":{{"os":"linux","architecture":"{host}"}}}},
            {{"digest":"{B}","size":1,"platform":{{"os":"linux","architecture":"{host}"}}}}]}}"#
    );
    for header in [OCI_INDEX, DOCKER_LIST] {
        let Ok(Parsed::Index(digest)) = parse(json.as_bytes(), header) else {
            panic!("not an index");
        };
        assert_eq!(digest.as_str(), A);
    }
}

#[test]
fn an_index_without_this_platform_says_what_it_offers() {
    let other = other_architecture();
    let json = format!(
        r#"{{"schemaVersion":2,"manifests":[
            {{"digest":"{B}","size":1,"platform":{{"os":"linux","architecture":"{other}"}}}}]}}"#
    );
    let message = parse_error(&json).to_string();
    assert!(message.contains(&format!("linux/{other}")), "{message}");
}

#[test]
fn what_is_no_image_is_refused_with_the_reason() {
    let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
    for (json, part) in [
        ("{".to_owned(), "malformed"),
        (
            r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(),
            "schema 1",
        ),
        (
            manifest("application/x-helm", OCI_CONFIG, gzip),
            "application/x-helm",
        ),
        (
            manifest(
                OCI_MANIFEST,
                "application/vnd.cncf.helm.config.v1+json",
                gzip,
            ),
            "helm",
        ),
        (
            manifest(OCI_MANIFEST, OCI_CONFIG, "text/plain"),
            "text/plain",
        ),
        (
            manifest(
                DOCKER_MANIFEST,
                DOCKER_CONFIG,
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            ),
            "foreign",
        ),
        (
            manifest(
                OCI_MANIFEST,
                OCI_CONFIG,
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            ),
            "foreign",
        ),
        (
            manifest(OCI_MANIFEST, OCI_CONFIG, gzip).replace("\"size\":2", "\"size\":99999999"),
            "larger",
        ),
        (
            manifest(OCI_MANIFEST, OCI_CONFIG, gzip).replace("\"size\":3", "\"size\":-3"),
            "malformed",
        ),
        (
            manifest(OCI_MANIFEST, OCI_CONFIG, gzip)
                .replace("\"config\"", "\"manifests\":[],\"config\""),
            "neither",
        ),
        (manifest(OCI_INDEX, OCI_CONFIG, gzip), "neither"),
    ] {
        let message = parse_error(&json).to_string();
        assert!(message.contains(part), "{message} for {json}");
    }
    let json = manifest(OCI_MANIFEST, OCI_CONFIG, gzip);
    assert!(parse(json.as_bytes(), DOCKER_MANIFEST).is_err());
}

#[test]
fn too_many_layers_are_refused() {
    let layer = format!(
        r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{B}","size":3}}"#
    );
    let layers = vec![layer; 128].join(",");
    let json = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"{OCI_CONFIG}","digest":"{A}","size":2}},
            "layers":[{layers}]}}"#
    );
    assert_eq!(
        parse_error(&json),
        ManifestError::TooManyLayers { count: 128 }
    );
}

#[test]
fn a_configuration_as_docker_writes_it_is_read() {
    let json = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Hostname":"","User":"1000:1000",
            "Env":["PATH=/bin"],"Cmd":["sh"],"Volumes":null,"WorkingDir":"","Entrypoint":null,
            "OnBuild":null,"Labels":null,"ArgsEscaped":true,"ExposedPorts":null}},
            "container":"x","created":"2024-01-01T00:00:00Z","docker_version":"20",
            "history":[{{"created":"2024-01-01T00:00:00Z","empty_layer":true}}],
            "rootfs":{{"type":"layers","diff_ids":["{A}"]}}}}"#
    );
    let (config, diff_ids) = parse_config(json.as_bytes()).unwrap();
    assert_eq!(diff_ids, [A.parse::<Digest>().unwrap()]);
    assert_eq!(
        config.config().as_ref().unwrap().user().as_deref(),
        Some("1000:1000")
    );
    let windows = json.replace("\"linux\"", "\"windows\"");
    let (config, _) = parse_config(windows.as_bytes()).unwrap();
    let message = check_platform(&config).unwrap_err().to_string();
    assert!(message.contains("windows/amd64"), "{message}");
    assert!(parse_config(json.replace(A, "sha256:1").as_bytes()).is_err());
    assert!(parse_config(b"[]").is_err());
}
