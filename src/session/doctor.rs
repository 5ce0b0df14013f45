//! Whether VMs run on this host.

use super::client::Client;
use crate::error::Result;
use crate::vm::{Diagnosis, Places, namespace};

impl Client {
    /// Tries everything that VMs need of this host, and boots a temporary one in the data directory.
    pub async fn doctor(&self) -> Result<Diagnosis> {
        let places = Places {
            data_dir: self.data_dir()?.to_owned(),
            agents: self.settings()?.agents.root().to_owned(),
        };
        // To its end though the caller gives up, so that nothing of the VM stays.
        let examined = tokio::spawn(namespace::examine(places)).await;
        examined.map_err(|error| {
            let problem = format!("the examination of this host ended: {error}");
            crate::error::Error::new(crate::error::Code::Internal, problem)
        })
    }
}
