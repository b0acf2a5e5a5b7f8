//! An interface as a list of what its wire depends on: every field, value and
//! method by what identifies it. Neither the order of declarations nor their
//! files matter.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

/// `Message.7` to the field's name, label and type; `Enum.NAME` to its number;
/// `Service.Method` to what goes in and out; each message to "".
pub type Listing = BTreeMap<String, String>;

pub fn of(set: &FileDescriptorSet) -> Listing {
    let mut listing = Listing::new();
    for file in &set.file {
        let package = file.package();
        for message in &file.message_type {
            of_message(package, message, &mut listing);
        }
        for enumeration in &file.enum_type {
            of_enum(package, enumeration, &mut listing);
        }
        for service in &file.service {
            for method in &service.method {
                let stream = |yes| if yes { "stream " } else { "" };
                listing.insert(
                    format!("{package}.{}.{}", service.name(), method.name()),
                    format!(
                        "{}{} -> {}{}",
                        stream(method.client_streaming()),
                        method.input_type(),
                        stream(method.server_streaming()),
                        method.output_type()
                    ),
                );
            }
        }
    }
    listing
}

/// The listing of a single `.proto` file.
pub fn of_file(path: &Path) -> Result<Listing> {
    let directory = path.parent().context("a file lies in a directory")?;
    let set = prost_build::Config::new()
        .load_fds(&[path], &[directory])
        .with_context(|| format!("protoc on {path:?}"))?;
    Ok(of(&set))
}

/// Has all that `listing` has, a line each.
pub fn text(listing: &Listing) -> String {
    let lines = listing
        .iter()
        .map(|(key, value)| format!("{key}: {value}\n"));
    lines.collect()
}

fn of_message(scope: &str, message: &DescriptorProto, listing: &mut Listing) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        let options = field.options.clone().unwrap_or_default();
        let oneof = field.oneof_index.map(|index| format!(" oneof {index}"));
        let packed = options.packed.map(|packed| format!(" packed {packed}"));
        listing.insert(
            format!("{name}.{}", field.number()),
            format!(
                "{} {:?} {:?} {}{}{}",
                field.name(),
                field.label(),
                field.r#type(),
                field.type_name(),
                oneof.unwrap_or_default(),
                packed.unwrap_or_default(),
            ),
        );
    }
    for inner in &message.nested_type {
        of_message(&name, inner, listing);
    }
    for inner in &message.enum_type {
        of_enum(&name, inner, listing);
    }
    listing.insert(name, String::new());
}

fn of_enum(scope: &str, enumeration: &EnumDescriptorProto, listing: &mut Listing) {
    for value in &enumeration.value {
        listing.insert(
            format!("{scope}.{}.{}", enumeration.name(), value.name()),
            value.number().to_string(),
        );
    }
}
