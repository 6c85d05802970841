//! Users, as `/etc/passwd` and `/etc/group` have them. A static program can ask no other directory.

use std::fs;
use std::io;

use rustix::process::{Gid, Uid};

/// Whom a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    /// All groups, the first one as well.
    pub(super) groups: Vec<Gid>,
    pub(super) home: String,
}

/// The user of this name or number. A number that nobody has is a user with a group of that number.
pub(super) fn find(user: &str) -> io::Result<Account> {
    let passwd = read_or_empty("/etc/passwd")?;
    let group = read_or_empty("/etc/group")?;
    look_up(user, &passwd, &group).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("the guest has no user {user:?}"),
        )
    })
}

fn read_or_empty(path: &str) -> io::Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

fn look_up(user: &str, passwd: &str, group: &str) -> Option<Account> {
    let number = user
        .parse::<u32>()
        .ok()
        .filter(|number| *number != u32::MAX);
    let found = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else {
            return None;
        };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        (name == user || number == Some(uid)).then(|| (name.to_owned(), uid, gid, home.to_owned()))
    });
    let (name, uid, gid, home) =
        found.or_else(|| number.map(|number| (user.to_owned(), number, number, "/".into())))?;
    let mut groups = vec![Gid::from_raw(gid)];
    for line in group.lines() {
        let fields: Vec<_> = line.split(':').collect();
        if let [_, _, gid, members, ..] = fields[..]
            && members.split(',').any(|member| member == name)
            && let Ok(gid) = gid.parse()
            && !groups.contains(&Gid::from_raw(gid))
        {
            groups.push(Gid::from_raw(gid));
        }
    }
    Some(Account {
        name,
        uid: Uid::from_raw(uid),
        gid: Gid::from_raw(gid),
        groups,
        home,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nada:x:1000:100:Ada,,:/home/ada:/bin/sh\n";
    const GROUP: &str = "users:x:100:\nwheel:x:10:ada,bob\nother:x:11:bob\n";

    #[test]
    fn a_user_is_found_by_name_and_by_number() {
        let by_name = look_up("ada", PASSWD, GROUP).unwrap();
        assert_eq!(look_up("1000", PASSWD, GROUP).unwrap(), by_name);
        assert_eq!(by_name.home, "/home/ada");
        let groups: Vec<_> = by_name.groups.iter().map(|group| group.as_raw()).collect();
        assert_eq!(groups, [100, 10]);
    }

    #[test]
    fn a_number_that_nobody_has_will_do_but_a_name_will_not() {
        assert_eq!(look_up("4711", PASSWD, GROUP).unwrap().gid.as_raw(), 4711);
        assert_eq!(look_up("eve", PASSWD, GROUP), None);
        // It would mean "leave the user as it is" to the kernel.
        assert_eq!(look_up("4294967295", PASSWD, GROUP), None);
    }
}
