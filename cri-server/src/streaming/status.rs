//! How an exec or attach ended, as the client reads it from the error stream:
//! since v4 of the protocol a `metav1.Status`, before it plain text.

use bytes::Bytes;
use serde_json::json;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusFormat {
    Text,
    Json,
}

/// `outcome` is the exit code, or why there is none. An empty result is not
/// sent at all.
pub fn report(outcome: &Result<i32, String>, format: StatusFormat) -> Bytes {
    let text = match outcome {
        Ok(0) => String::new(),
        Ok(code) => format!("command terminated with non-zero exit code: {code}"),
        Err(why) => format!("Internal error occurred: {why}"),
    };
    if format == StatusFormat::Text {
        return text.into();
    }
    let status = match outcome {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "message": text,
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(why) => json!({
            "metadata": {},
            "status": "Failure",
            "message": text,
            "reason": "InternalError",
            "details": {"causes": [{"message": why}]},
            "code": 500,
        }),
    };
    status.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcomes_read_as_kubernetes_writes_them() {
        let read = |outcome| -> serde_json::Value {
            serde_json::from_slice(&report(&outcome, StatusFormat::Json)).unwrap()
        };
        assert_eq!(read(Ok(0)), json!({"metadata": {}, "status": "Success"}));
        let failed = read(Ok(137));
        assert_eq!(failed["status"], "Failure");
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(
            failed["details"]["causes"],
            json!([{"reason": "ExitCode", "message": "137"}])
        );
        let internal = read(Err("no such program".to_owned()));
        assert_eq!(internal["reason"], "InternalError");
        assert_eq!(internal["code"], 500);
        assert!(
            internal["message"]
                .as_str()
                .unwrap()
                .contains("no such program")
        );
        assert!(report(&Ok(0), StatusFormat::Text).is_empty());
        assert!(report(&Ok(2), StatusFormat::Text).ends_with(b": 2"));
    }
}
