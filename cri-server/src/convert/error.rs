//! Errors as gRPC statuses: the code for machines, one sentence for people.

use imagesvc::ErrorKind as ImageKind;
use podsandbox::ErrorKind;
use tonic::{Code, Status};

pub fn pod(error: podsandbox::Error) -> Status {
    let code = match error.kind() {
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Unimplemented => Code::Unimplemented,
        ErrorKind::Internal => Code::Internal,
    };
    Status::new(code, error.sentence())
}

pub fn image(error: imagesvc::Error) -> Status {
    let code = match error.kind() {
        ImageKind::InvalidArgument => Code::InvalidArgument,
        ImageKind::NotFound => Code::NotFound,
        ImageKind::Unauthorized => Code::Unauthenticated,
        ImageKind::Unavailable => Code::Unavailable,
        ImageKind::Corrupt => Code::DataLoss,
        ImageKind::Unsupported | ImageKind::Unconfined => Code::FailedPrecondition,
        ImageKind::ResourceExhausted => Code::ResourceExhausted,
        ImageKind::DeadlineExceeded => Code::DeadlineExceeded,
        ImageKind::Cancelled => Code::Cancelled,
        ImageKind::Internal => Code::Internal,
    };
    Status::new(code, podsandbox::sentence(&error))
}
