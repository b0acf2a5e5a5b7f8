//! Who a container's process runs as: names and numbers of the request against
//! the container's own /etc/passwd and /etc/group (passwd(5), group(5)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use agent_api::User as Request;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use crate::sys;

/// A passwd file beyond this is no passwd file; the text is the image's and
/// is read into the agent's memory.
const MAX_FILE: u64 = 1024 * 1024;

/// `NGROUPS_MAX` of Linux.
const MAX_GROUPS: usize = 65536;

#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error("unable to find user {name}: no matching entries in passwd file")]
    UnknownUser { name: String },
    #[error("unable to find group {name}: no matching entries in group file")]
    UnknownGroup { name: String },
    #[error("{field} {value} is no user or group id")]
    Range { field: &'static str, value: i64 },
    #[error("the user has more than {MAX_GROUPS} groups")]
    TooManyGroups,
    #[error("cannot read /{path} of the container")]
    Read {
        path: &'static str,
        source: io::Error,
    },
    #[error("/{path} of the container is larger than {MAX_FILE} bytes")]
    TooLarge { path: &'static str },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub uid: u32,
    pub gid: u32,
    /// The primary group and the supplemental ones, in ascending order.
    pub groups: Vec<u32>,
    pub home: Option<String>,
}

/// Resolves `request` in the root that `root` is the directory of.
pub fn resolve_in(root: BorrowedFd<'_>, request: &Request) -> Result<Resolved, UserError> {
    let passwd = read(root, "etc/passwd", c"etc/passwd")?;
    let group = read(root, "etc/group", c"etc/group")?;
    resolve(&passwd, &group, request)
}

/// The text of a file of the container; empty when there is none. What is no
/// regular file is none: a FIFO there would hold up the agent.
fn read(
    root: BorrowedFd<'_>,
    path: &'static str,
    c_path: &std::ffi::CStr,
) -> Result<String, UserError> {
    let failed = |errno: Errno| UserError::Read {
        path,
        source: errno.into(),
    };
    let flags = (OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = match sys::openat2(root, c_path, flags, libc::RESOLVE_IN_ROOT) {
        Ok(file) => file,
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO) => {
            return Ok(String::new());
        }
        Err(errno) => return Err(failed(errno)),
    };
    if fstat(file.as_fd()).map_err(failed)?.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    File::from(file)
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| UserError::Read { path, source })?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(UserError::TooLarge { path });
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = fields.next()?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn id(field: &'static str, value: i64) -> Result<u32, UserError> {
    // The highest number means "unchanged" to the kernel.
    u32::try_from(value)
        .ok()
        .filter(|&id| id != u32::MAX)
        .ok_or(UserError::Range { field, value })
}

fn resolve(passwd: &str, group: &str, request: &Request) -> Result<Resolved, UserError> {
    let account = if request.username.is_empty() {
        let uid = id("uid", request.uid.unwrap_or(0))?;
        (uid, accounts(passwd).find(|account| account.uid == uid))
    } else {
        let name = request.username.as_str();
        let number = name.parse::<i64>().ok();
        let by_name = accounts(passwd).find(|account| account.name == name);
        match (by_name, number) {
            (Some(account), _) => (account.uid, Some(account)),
            (None, Some(number)) => {
                let uid = id("uid", number)?;
                (uid, accounts(passwd).find(|account| account.uid == uid))
            }
            (None, None) => {
                return Err(UserError::UnknownUser {
                    name: name.to_owned(),
                });
            }
        }
    };
    let (uid, account) = account;

    let gid = match (request.gid, request.groupname.as_str()) {
        (Some(gid), _) => id("gid", gid)?,
        (None, "") => account.as_ref().map_or(0, |account| account.gid),
        (None, name) => match groups(group).find(|(other, ..)| *other == name) {
            Some((_, gid, _)) => gid,
            None => match name.parse() {
                Ok(number) => id("gid", number)?,
                Err(_) => {
                    return Err(UserError::UnknownGroup {
                        name: name.to_owned(),
                    });
                }
            },
        },
    };

    let mut all = vec![gid];
    for &group in &request.supplemental_groups {
        all.push(id("supplemental group", group)?);
    }
    if let (Some(account), false) = (&account, request.strict_groups) {
        all.extend(
            groups(group)
                .filter(|(.., members)| members.split(',').any(|member| member == account.name))
                .map(|(_, gid, _)| gid),
        );
    }
    all.sort_unstable();
    all.dedup();
    if all.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups);
    }
    let home = account
        .map(|account| account.home.to_owned())
        .filter(|home| !home.is_empty());
    Ok(Resolved {
        uid,
        gid,
        groups: all,
        home,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:w:/srv:/bin/sh\n77:x:5:6::/:\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlog:x:4:web,other\nadm:x:9:other\n";

    fn request(username: &str) -> Request {
        Request {
            username: username.to_owned(),
            ..Request::default()
        }
    }

    fn resolved(request: &Request) -> Resolved {
        resolve(PASSWD, GROUP, request).unwrap()
    }

    #[test]
    fn nothing_asked_means_root() {
        let user = resolved(&request(""));
        assert_eq!(
            (user.uid, user.gid, user.home.as_deref()),
            (0, 0, Some("/root"))
        );
        assert_eq!(resolve("", "", &request("")).unwrap().home, None);
    }

    #[test]
    fn a_name_brings_its_group_home_and_memberships() {
        let user = resolved(&request("web"));
        assert_eq!(
            user,
            Resolved {
                uid: 33,
                gid: 34,
                groups: vec![4, 34],
                home: Some("/srv".into())
            }
        );
    }

    #[test]
    fn strict_leaves_out_the_images_memberships() {
        let user = resolved(&Request {
            strict_groups: true,
            supplemental_groups: vec![2000],
            ..request("web")
        });
        assert_eq!(user.groups, [34, 2000]);
    }

    #[test]
    fn a_number_needs_no_entry_but_uses_one() {
        assert_eq!(resolved(&request("33")).gid, 34);
        assert_eq!(resolved(&request("4242")).gid, 0);
        assert_eq!(
            resolved(&request("77")).uid,
            5,
            "a name of digits is a name first"
        );
    }

    #[test]
    fn a_group_may_be_a_name_or_a_number() {
        let with = |groupname: &str| Request {
            groupname: groupname.to_owned(),
            ..request("web")
        };
        assert_eq!(resolved(&with("adm")).gid, 9);
        assert_eq!(resolved(&with("123")).gid, 123);
        let error = resolve(PASSWD, GROUP, &with("nope")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unable to find group nope: no matching entries in group file"
        );
    }

    #[test]
    fn an_unknown_name_is_said() {
        let error = resolve(PASSWD, GROUP, &request("nobody")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unable to find user nobody: no matching entries in passwd file"
        );
    }

    #[test]
    fn ids_out_of_range_are_refused() {
        for uid in [-1, i64::from(u32::MAX), i64::MAX] {
            let request = Request {
                uid: Some(uid),
                ..Request::default()
            };
            assert!(matches!(
                resolve("", "", &request),
                Err(UserError::Range { .. })
            ));
        }
    }

    #[test]
    fn a_link_out_of_the_root_and_a_fifo_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("../../../../etc/passwd", root.path().join("etc/passwd"))
            .unwrap();
        nix::unistd::mkfifo(
            &root.path().join("etc/group"),
            nix::sys::stat::Mode::S_IRWXU,
        )
        .unwrap();
        let dir = File::open(root.path()).unwrap();
        let error = resolve_in(dir.as_fd(), &request("daemon")).unwrap_err();
        assert!(matches!(error, UserError::UnknownUser { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(passwd: String, group: String, username: String, groupname: String) {
            let request = Request { username, groupname, ..Request::default() };
            let _ = resolve(&passwd, &group, &request);
        }
    }
}
