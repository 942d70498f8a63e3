//! Stubs from the protos beside this file, with a protoc of their own.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    std::env::set_var("PROTOC", protoc_bin_vendored::protoc_bin_path()?);
    println!("cargo:rerun-if-changed=protos");
    tonic_prost_build::configure().build_server(false).compile_protos(
        &[
            "protos/osaurus/v1/inference_service.proto",
            "protos/osaurus/v1/model_service.proto",
            "protos/grpc/health/v1/health.proto",
        ],
        &["protos"],
    )?;
    Ok(())
}
