//! What the kernel's command line tells PID 1.

/// `forkvm.run=` and `forkvm.quiet`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Words {
    /// A shell's command, in double quotes when it has blanks.
    pub(super) job: Option<String>,
    /// No shell on the console.
    pub(super) quiet: bool,
}

impl Words {
    pub(super) fn parse(cmdline: &[u8]) -> Words {
        let text = String::from_utf8_lossy(cmdline);
        let mut words = Words {
            job: None,
            quiet: false,
        };
        for word in split(text.trim_end()) {
            // A word may be quoted as a whole.
            let word = word.strip_prefix('"').unwrap_or(word);
            if let Some(job) = word.strip_prefix("forkvm.run=") {
                let job = job.replace('"', "");
                words.job = Some(job).filter(|job| !job.is_empty());
            } else if word == "forkvm.quiet" {
                words.quiet = true;
            }
        }
        words
    }
}

/// As the kernel splits it: at blanks that are not within double quotes.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |letter: char| {
        quoted ^= letter == '"';
        !quoted && letter.is_ascii_whitespace()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(text: &str) -> Option<String> {
        Words::parse(text.as_bytes()).job
    }

    #[test]
    fn a_job_is_a_word_or_what_is_in_quotes() {
        assert_eq!(job("quiet forkvm.run=poweroff a=b\n").unwrap(), "poweroff");
        let quoted = job("console=ttyS0 forkvm.run=\"uname -a; free\" panic=-1\n");
        assert_eq!(quoted.unwrap(), "uname -a; free");
        assert_eq!(job("\"forkvm.run=uname -a\"").unwrap(), "uname -a");
    }

    #[test]
    fn without_a_job_there_is_a_shell_unless_it_shall_be_quiet() {
        let words = Words::parse(b"console=ttyS0 forkvm.quiet\n");
        assert_eq!(
            words,
            Words {
                job: None,
                quiet: true
            }
        );
        assert!(!Words::parse(b"").quiet);
        assert_eq!(job("xforkvm.run=a forkvm.run="), None);
    }
}
