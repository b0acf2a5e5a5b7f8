//! CRI's ImageService.

use std::path::Path;

use cri_api::v1;
use cri_api::v1::image_service_server::ImageService as Cri;
use imagesvc::{Auth, Image, ImageService};
use podsandbox::PodManager;
use tonic::{Request, Response, Status};

use crate::chunks::{self, Messages};
use crate::convert::{error, invalid, required};

pub struct Images {
    images: ImageService,
    pods: PodManager,
}

impl Images {
    pub fn new(images: ImageService, pods: PodManager) -> Self {
        Self { images, pods }
    }

    fn list(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let name = filter.and_then(|filter| filter.image).map(|i| i.image);
        let name = name.filter(|name| !name.is_empty());
        let images = self.images.list(name.as_deref());
        images.iter().map(show).collect()
    }
}

fn name(spec: Option<v1::ImageSpec>) -> Result<String, Status> {
    let spec = required("image", spec)?;
    if spec.image.is_empty() {
        return Err(invalid("image.image", "is empty"));
    }
    Ok(spec.image)
}

fn show(image: &Image) -> v1::Image {
    let uid = image.uid.map(|value| v1::Int64Value { value });
    v1::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        username: if uid.is_some() {
            String::new()
        } else {
            image.username.clone()
        },
        uid,
        spec: Some(v1::ImageSpec {
            image: image.id.clone(),
            ..v1::ImageSpec::default()
        }),
        pinned: image.pinned,
    }
}

fn auth(auth: v1::AuthConfig) -> Option<Auth> {
    let empty = v1::AuthConfig::default();
    (auth != empty).then_some(Auth {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    })
}

#[tonic::async_trait]
impl Cri for Images {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        Ok(Response::new(v1::ListImagesResponse {
            images: self.list(request.into_inner().filter),
        }))
    }

    type StreamImagesStream = Messages<v1::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.list(request.into_inner().filter);
        Ok(chunks::stream(images, |images| v1::StreamImagesResponse {
            images,
        }))
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let image = self.images.status(&name(request.image)?);
        let details = |image: &Image| {
            crate::json_info(serde_json::json!({
                "layers": image.layers.iter().map(|layer| serde_json::json!({
                    "digest": layer.digest,
                    "diffID": layer.diff_id,
                    "compressedSize": layer.compressed_size,
                    "size": layer.size,
                })).collect::<Vec<_>>(),
                "imageSpec": image.config,
            }))
        };
        Ok(Response::new(v1::ImageStatusResponse {
            info: image
                .as_ref()
                .filter(|_| request.verbose)
                .map(details)
                .unwrap_or_default(),
            image: image.as_ref().map(show),
        }))
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        let request = request.into_inner();
        let name = name(request.image)?;
        let pulled = self
            .images
            .pull(&name, request.auth.and_then(auth))
            .await
            .map_err(error::image)?;
        Ok(Response::new(v1::PullImageResponse {
            image_ref: pulled.id,
        }))
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let name = name(request.into_inner().image)?;
        self.images.remove(&name).await.map_err(error::image)?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        let usage =
            |mountpoint: &Path, timestamp, (bytes, files): (u64, u64)| v1::FilesystemUsage {
                timestamp,
                fs_id: Some(v1::FilesystemIdentifier {
                    mountpoint: mountpoint.to_string_lossy().into_owned(),
                }),
                used_bytes: Some(v1::UInt64Value { value: bytes }),
                inodes_used: Some(v1::UInt64Value { value: files }),
            };
        let images = self.images.fs_info().await.map_err(error::image)?;
        let scratch = self.pods.scratch_usage().await.map_err(error::pod)?;
        let now = images.timestamp_unix_nanos;
        let containers = usage(&self.pods.scratch_dir(), now, scratch);
        let images = usage(
            &images.mountpoint,
            now,
            (images.used_bytes, images.inodes_used),
        );
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![images],
            container_filesystems: vec![containers],
        }))
    }
}
