// Pool a photo from Node, without Python: sharp reads and writes the images, gRPC's own packages call the server.
//
// npm install --prefix examples/node
// node examples/node/pool_photo.js photo.jpg pooled.png 127.0.0.1:50051
//
// The photo is sent as it is, 8 bits and channels last; the branches are a maximum and an average of cells of 4 x 4, which
// are written next to each other. The client is made from protos/poolrpc/v1/pool.proto when the program starts.
'use strict'
const path = require('node:path')
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')
const sharp = require('sharp')

const includeDirs = [path.join(__dirname, '../../protos')]
const options = { includeDirs, keepCase: true, longs: Number, enums: String }
const { PoolService } = grpc.loadPackageDefinition(loader.loadSync('poolrpc/v1/pool.proto', options)).poolrpc.v1

function pool(client, request) {
  const metadata = new grpc.Metadata()
  metadata.set('poolrpc-message-bytes', String(PoolService.service.Pool.requestSerialize(request).length))
  return new Promise((resolve, reject) => {
    client.Pool(request, metadata, { deadline: Date.now() + 30_000 }, (error, response) =>
      error ? reject(error) : resolve(response),
    )
  })
}

async function main(photo, picture, address = '127.0.0.1:50051') {
  const { data, info } = await sharp(photo).toColourspace('srgb').removeAlpha().raw().toBuffer({ resolveWithObject: true })
  const client = new PoolService(address, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': 513 * 2 ** 20, // 4 MiB unless set
  })
  const cells = { spatial_dims: 2, kernel_size: [4] }
  const rounded = [{ avg_pool: cells }, { round: {} }, { to_dtype: { dtype: 'DATA_TYPE_UINT8' } }]
  const response = await pool(client, {
    input: { dtype: 'DATA_TYPE_UINT8', shape: [info.height, info.width, info.channels], layout: 'LAYOUT_CHANNELS_LAST' },
    branches: [
      { layers: [{ max_pool: cells }] },
      { layers: [{ to_dtype: { dtype: 'DATA_TYPE_FLOAT32' } }, ...rounded] },
    ],
    payload: data,
  })
  client.close()
  // The outputs of all branches are in the payload, one after the other.
  const [height, width, channels] = response.results[0].output.shape
  const raw = { width, height, channels }
  const bytes = width * height * channels
  const [maxima, averages] = [0, 1].map((branch) => response.payload.subarray(branch * bytes, (branch + 1) * bytes))
  await sharp(maxima, { raw })
    .extend({ right: width, background: 'white' })
    .composite([{ input: averages, raw, left: width, top: 0 }])
    .removeAlpha()
    .png()
    .toFile(picture)
  console.log(`${info.height} x ${info.width} -> ${height} x ${width}, twice`)
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message)
  process.exitCode = 1
})
