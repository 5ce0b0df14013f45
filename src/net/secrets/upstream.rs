//! The other half of a connection that was ended here: TLS to the real server, verified as a client in
//! this process does, and any of the host.

use std::env;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

#[derive(Default)]
pub(super) struct Upstream {
    /// Reading the host's authorities takes some milliseconds, which a VM spends that connects.
    config: OnceCell<ClientConfig>,
}

impl Upstream {
    /// `protocols`: what is offered, as ALPN names it.
    pub(super) async fn connect(
        &self,
        server: TcpStream,
        name: &str,
        protocols: Vec<Vec<u8>>,
    ) -> io::Result<TlsStream<TcpStream>> {
        let config = self.config.get_or_try_init(|| async {
            let config = tokio::task::spawn_blocking(config);
            config
                .await
                .map_err(io::Error::other)?
                .map_err(io::Error::other)
        });
        let mut config = config.await?.clone();
        config.alpn_protocols = protocols;
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        TlsConnector::from(Arc::new(config))
            .connect(name, server)
            .await
    }
}

fn config() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Verifier::new_with_extra_roots(authorities_of_node(), Arc::clone(&provider))?;
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

/// What Node trusts in this process beside what it comes with. As in Node, a file that can't be used is
/// told of, and counts for nothing.
fn authorities_of_node() -> Vec<CertificateDer<'static>> {
    let Some(path) = env::var_os("NODE_EXTRA_CA_CERTS").map(PathBuf::from) else {
        return Vec::new();
    };
    let mut certificates: Vec<_> = CertificateDer::pem_file_iter(&path)
        .and_then(Iterator::collect)
        .unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path.display(), "can't read NODE_EXTRA_CA_CERTS");
            Vec::new()
        });
    // One that is none would fail the verifier with all others.
    certificates.retain(|certificate| RootCertStore::empty().add(certificate.clone()).is_ok());
    certificates
}
