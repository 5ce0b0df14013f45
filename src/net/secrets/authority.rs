//! The certificate authority of one run of a VM. Nobody else trusts it, its key is nowhere but here, and
//! both are gone with the VM.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, Error, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SerialNumber,
};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

const NAME: &str = "agentvm, for this VM alone";

/// Clocks differ.
const BEFORE: Duration = Duration::from_hours(24);
/// No VM runs for so long.
const AFTER: Duration = Duration::from_hours(24 * 365 * 10);

/// Names that certificates are kept for. Below a `*.` a VM can ask for any number.
const MAX_KEPT: usize = 64;

/// What is negotiated with a client for a name: `None` where it offers no application protocol.
type Kept = HashMap<(String, Option<Vec<u8>>), Arc<ServerConfig>>;

pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    pem: String,
    /// Of all its certificates.
    key: KeyPair,
    kept: Mutex<Kept>,
}

impl Authority {
    pub(super) fn new() -> Result<Self, Error> {
        let mut params = params(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self {
            pem: issuer.pem(),
            issuer,
            key: KeyPair::generate()?,
            kept: Mutex::default(),
        })
    }

    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// How to be the server `name`, and to speak `protocol` as it.
    pub(super) fn server(
        &self,
        name: &str,
        protocol: Option<Vec<u8>>,
    ) -> Result<Arc<ServerConfig>, Box<dyn std::error::Error + Send + Sync>> {
        let key = (name.to_owned(), protocol);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = kept.get(&key) {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(self.make(name, key.1.clone())?);
        if kept.len() >= MAX_KEPT {
            kept.clear();
        }
        kept.insert(key, Arc::clone(&config));
        drop(kept);
        Ok(config)
    }

    fn make(
        &self,
        name: &str,
        protocol: Option<Vec<u8>>,
    ) -> Result<ServerConfig, Box<dyn std::error::Error + Send + Sync>> {
        let mut params = params(vec![name.to_owned()])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        // Strict clients want both: who has signed it, and that no two have the same number.
        params.use_authority_key_identifier_extension = true;
        let provider = Arc::new(ring::default_provider());
        let mut serial = [0; 16];
        let filled = provider.secure_random.fill(&mut serial);
        filled.map_err(|_| "the system has no randomness to give")?;
        serial[0] &= 0x7f;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let certificate = params.signed_by(&self.key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = protocol.into_iter().collect();
        Ok(config)
    }
}

fn params(names: Vec<String>) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let now = SystemTime::now();
    params.not_before = (now - BEFORE).into();
    params.not_after = (now + AFTER).into();
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_kept_within_bounds() {
        let authority = Authority::new().expect("an authority");
        let http = Some(b"http/1.1".to_vec());
        let one = authority
            .server("a.example", http.clone())
            .expect("a server");
        let again = authority.server("a.example", http).expect("a server");
        assert!(Arc::ptr_eq(&one, &again));
        for number in 0..200 {
            let name = format!("{number}.example");
            authority.server(&name, None).expect("a server");
        }
        assert!(authority.kept.lock().expect("kept").len() <= MAX_KEPT);
    }
}
