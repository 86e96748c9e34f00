//! Errors of BPF operations.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// An operation on programs, maps or pins failed.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The kernel does not permit the operation to this process.
    #[error("{operation}: not permitted; run it as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN")]
    NotPermitted {
        /// The operation and its object, for example "creating map X".
        operation: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The kernel was built without a feature.
    #[error(
        "{operation}: this kernel was built without it (CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF, CONFIG_NET_SCH_INGRESS)"
    )]
    Unsupported {
        /// The operation and its object, for example "creating map X".
        operation: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The verifier refused a program.
    #[error("loading {program}: the kernel's verifier refused it; its log ends with\n{log}")]
    Refused {
        program: String,
        /// The last lines of the verifier's log.
        log: String,
        #[source]
        source: io::Error,
    },
    /// The kernel lacks something that the verifier needs for these programs.
    #[error("loading {program}: {lack}")]
    Lacks {
        program: String,
        /// What is missing, and which kernels have it.
        lack: &'static str,
        #[source]
        source: io::Error,
    },
    /// Anything else that failed.
    #[error("{operation}")]
    Failed {
        /// The operation and its object, for example "creating map X".
        operation: String,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The pins exist already.
    #[error("{} is there already: the site is steered, or its last run was cut short; `ecmpvpn down` removes it", dir.display())]
    AlreadyThere { dir: PathBuf },
    /// The pins do not exist.
    #[error("{} is not there: the site is not steered; `ecmpvpn run` starts it", dir.display())]
    NotRunning { dir: PathBuf },
    /// This mount namespace does not show the pins, if there are any.
    #[error(
        "{} cannot be looked at: no BPF file system is mounted there in this mount namespace, which `ip netns exec` makes \
         anew; if the site runs, use `nsenter --net={} ecmpvpn …` instead",
        .dir.display(),
        .namespace.display()
    )]
    Hidden {
        dir: PathBuf,
        /// A file of this network namespace.
        namespace: PathBuf,
    },
    /// The table does not fit the maps, or the maps do not fit this program.
    #[error("{0}")]
    Mismatch(String),
}

impl DataplaneError {
    /// Whether the host lacks something: a privilege or a kernel feature.
    pub fn is_host_lacking(&self) -> bool {
        matches!(self, Self::NotPermitted { .. } | Self::Unsupported { .. } | Self::Lacks { .. })
    }

    /// Classifies the failure of `operation` by the kernel's error code.
    pub(super) fn new(operation: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        let (operation, code) = (operation.into(), os_error(&source));
        let source = Box::new(source);
        match code {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { operation, source },
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Self::Unsupported { operation, source },
            _ => Self::Failed { operation, source },
        }
    }
}

/// The first operating system error among `error` and its sources.
pub(super) fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_code_decides_the_kind() {
        let error = |code| DataplaneError::new("creating map X", io::Error::from_raw_os_error(code));
        assert!(matches!(error(libc::EPERM), DataplaneError::NotPermitted { .. }));
        assert!(matches!(error(libc::ENOSYS), DataplaneError::Unsupported { .. }));
        assert!(matches!(error(libc::ENOENT), DataplaneError::Failed { .. }));
        assert!(error(libc::EPERM).is_host_lacking() && !error(libc::ENOENT).is_host_lacking());
    }
}
