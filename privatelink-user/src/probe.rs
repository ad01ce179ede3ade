//! Health checks: connections and requests from the load balancer's address, inside the provider's VPC.

use crate::model::CheckProtocol;
use crate::plan::Check;
use crate::sockets::{Kind, Sockets};
use anyhow::{Context, Result, ensure};
use http_body_util::Empty;
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use privatelink_common::path::proxy::LOCAL;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};

/// A check's result.
#[derive(Debug)]
pub struct Observed {
    /// The target.
    pub target: u32,
    /// What went wrong, if anything.
    pub result: Result<(), String>,
}

/// First checks of many targets begin so far from each other.
const APART: Duration = Duration::from_millis(1);

/// Checks one target for as long as the task lives: the first time at once, but for the targets with lower numbers, and then at every
/// interval, however long a check takes. Intervals are up to 4 % shorter, by the target's number, so that checks stay spread.
pub async fn watch(target: u32, check: Check, sockets: Sockets, results: mpsc::Sender<Observed>) {
    tokio::time::sleep(APART * target).await;
    let interval = check.how.interval - check.how.interval / 100 * (target % 5);
    let mut turns = tokio::time::interval(interval);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let result = match tokio::time::timeout(check.how.timeout, check_once(&check, &sockets)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err(format!("no success within {}", humantime::format_duration(check.how.timeout))),
        };
        if results.send(Observed { target, result }).await.is_err() {
            return;
        }
    }
}

/// One check, whatever it is.
async fn check_once(check: &Check, sockets: &Sockets) -> Result<()> {
    let stream = connect(check, sockets).await?;
    match &check.how.protocol {
        CheckProtocol::Tcp => Ok(()),
        CheckProtocol::Http { tls: false, path, matcher } => ask(stream, check, path, matcher).await,
        CheckProtocol::Http { tls: true, path, matcher } => {
            let name = ServerName::IpAddress(check.address.into());
            let connector = TlsConnector::from(Arc::new(tls()?));
            let stream = connector.connect(name, stream).await.context("no TLS handshake")?;
            ask(stream, check, path, matcher).await
        }
    }
}

async fn connect(check: &Check, sockets: &Sockets) -> Result<TcpStream> {
    let socket = sockets.open(Kind::Connection, SocketAddr::new(check.source, 0)).await?;
    let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
    let to = SocketAddr::new(check.address, check.port);
    let mut stream = socket.connect(to).await.with_context(|| format!("cannot connect to {to}"))?;
    if check.proxied {
        stream.write_all(&LOCAL).await.context("cannot send the Proxy Protocol's header")?;
    }
    Ok(stream)
}

/// Sends the request, and compares the answer's status; its body is of no interest, and redirects are not followed (AWS:
/// target-group-health-checks).
async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    check: &Check,
    path: &str,
    matcher: &[RangeInclusive<u16>],
) -> Result<()> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.context("no HTTP")?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path)
        .header("host", SocketAddr::new(check.address, check.port).to_string())
        .header("user-agent", "ELB-HealthChecker/2.0")
        .header("connection", "close")
        .body(Empty::<&'static [u8]>::new())?;
    let answer = sender.send_request(request).await;
    connection.abort();
    let status = answer.context("no answer to the request")?.status().as_u16();
    ensure!(matcher.iter().any(|range| range.contains(&status)), "the answer's status is {status}");
    Ok(())
}

/// TLS that believes any certificate, as AWS's health checks do: they ask whether a target works, not who it is.
fn tls() -> Result<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(Anyone(provider.signature_verification_algorithms.supported_schemes()));
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

#[derive(Debug)]
struct Anyone(Vec<SignatureScheme>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, tokio_rustls::rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}
