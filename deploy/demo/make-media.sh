#!/usr/bin/env bash
# Makes the media of the demo: every picture, sound and film is drawn by ffmpeg from formulas, so the files carry no
# foreign rights. The results are committed; run this only to change them, then write the manifest again, because
# another build of the encoders gives other bytes and so other hashes:
#
#   deploy/demo/make-media.sh
#   python -m distributor_node.services.demo.manifest --output deploy/demo/manifest.yaml
#
# File names are <object id>-<name>.<extension>; a film and its subtitles share the name.
# The SVG (4-lighthouse.svg) and the subtitles (6-day.vtt) are written by hand and are not touched.
# Needs: ffmpeg with libx264, libvpx-vp9, libopus, libwebp and drawtext; the DejaVu fonts. Takes about a minute.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
media="${1:-$here/media}"
font="${FONT:-/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf}"
mkdir -p "$media"

# No dates, no encoder versions: the same build gives the same bytes.
quiet=(-hide_banner -loglevel error -nostdin -y)
exact=(-map_metadata -1 -fflags +bitexact -flags:v +bitexact -flags:a +bitexact -threads 1)

# 1: a sunrise over hills: a sky that grows warmer downwards, a sun with a halo, two rows of hills.
sky_red='60+190*Y/H'; sky_green='70+110*pow(Y/H\,2)'; sky_blue='150-70*Y/H'
sun='exp(-pow(hypot(X-W*0.62\,Y-H*0.52)/95\,4))'
halo='exp(-hypot(X-W*0.62\,Y-H*0.52)/170)'
far='gt(Y\,H*0.66-34*sin(X/97)-18*sin(X/41+1))'
near='gt(Y\,H*0.80-40*sin(X/143+2)-12*sin(X/37))'
ffmpeg "${quiet[@]}" -f lavfi -i "color=black:s=960x540,format=gbrp,geq=\
r='if($near\,24\,if($far\,74\,min(255\,$sky_red+90*$halo+160*$sun)))':\
g='if($near\,30\,if($far\,58\,min(255\,$sky_green+90*$halo+150*$sun)))':\
b='if($near\,56\,if($far\,96\,min(255\,$sky_blue+20*$halo+60*$sun)))'" \
  -frames:v 1 "${exact[@]}" -pix_fmt rgb24 -pred mixed -compression_level 9 "$media/1-sunrise.png"

# 2: the edge of the Mandelbrot set.
ffmpeg "${quiet[@]}" -f lavfi -i "mandelbrot=s=1280x720:start_scale=0.006:start_x=-0.7453:start_y=0.1127:maxiter=2048" \
  -frames:v 1 "${exact[@]}" -vf "hue=h=200:s=0.9,eq=gamma=1.15" -pix_fmt yuvj420p -q:v 6 "$media/2-mandelbrot.jpg"

# 3: a soft gradient of five colours, seen through rings.
ffmpeg "${quiet[@]}" -f lavfi -i "gradients=s=960x540:c0=0x0b3954:c1=0x087e8b:c2=0xbfd7ea:c3=0xff5a5f:c4=0xc81d25:nb_colors=5:seed=7:x0=0:y0=0:x1=960:y1=540" \
  -frames:v 1 "${exact[@]}" \
  -vf "format=gbrp,geq=r='r(X\,Y)*(0.8+0.2*sin(hypot(X-480\,Y-270)/9))':g='g(X\,Y)*(0.8+0.2*sin(hypot(X-480\,Y-270)/9))':b='b(X\,Y)*(0.8+0.2*sin(hypot(X-480\,Y-270)/9))'" \
  -c:v libwebp -quality 80 "$media/3-rings.webp"

# 5: a day in 96 seconds: the sun crosses the sky, a large clock and a bar show where one is. One key frame every
# two seconds, so that a seek lands at once; no -movflags faststart: the index (moov) stays at the END of the file,
# which makes players ask for the end first.
clock="drawtext=fontfile=$font:fontsize=64:fontcolor=white:shadowcolor=black@0.6:shadowx=2:shadowy=2:x=(w-tw)/2:y=h*0.10:text='%{pts\\:hms}'"
bar="drawbox=x=40:y=ih-34:w=iw-80:h=10:color=white@0.25:t=fill"
ffmpeg "${quiet[@]}" \
  -f lavfi -i "gradients=s=640x360:r=24:d=96:c0=0x14213d:c1=0x2a6f97:c2=0xe07a5f:c3=0x3d405b:nb_colors=4:seed=11:speed=0.004" \
  -f lavfi -i "color=c=0xffd166:s=48x48:r=24:d=96,format=rgba,geq=r=255:g=209:b=102:a='255*clip(24-hypot(X-23.5\,Y-23.5)\,0\,1)'" \
  -f lavfi -i "color=c=0xffffff:s=6x22:r=24:d=96" \
  -f lavfi -i "aevalsrc='0.12*sin(2*PI*220*t)*(0.6+0.4*sin(2*PI*t/8))+0.08*sin(2*PI*277.18*t)*(0.6+0.4*sin(2*PI*t/6))+0.08*sin(2*PI*329.63*t)*(0.6+0.4*sin(2*PI*t/5))+0.25*sin(2*PI*880*t)*exp(-18*mod(t\,4))':s=44100:d=96" \
  -filter_complex "[0][1]overlay=x='W*t/96-24':y='H*0.72-H*0.42*sin(PI*t/96)':eval=frame[sky];\
[sky]$clock,$bar[base];[base][2]overlay=x='37+560*t/96':y=H-40:eval=frame[marked];\
[marked]drawtext=fontfile=$font:fontsize=16:fontcolor=white@0.8:x=40:y=h-66:text='frame %{n}'[v]" \
  -map "[v]" -map 3:a -t 96 "${exact[@]}" \
  -c:v libx264 -profile:v baseline -level 3.0 -pix_fmt yuv420p -preset slow -crf 31 -g 48 -keyint_min 48 -sc_threshold 0 \
  -c:a aac -b:a 40k -ac 1 "$media/5-day.mp4"

# 7: ten seconds of falling into the Mandelbrot set, VP9 with Opus.
ffmpeg "${quiet[@]}" \
  -f lavfi -i "mandelbrot=s=480x270:r=20:start_scale=2.6:end_scale=0.02:end_pts=200:start_x=-0.7453:start_y=0.1127:maxiter=512" \
  -f lavfi -i "aevalsrc='0.2*sin(2*PI*(180*t+12*t*t))*(0.7+0.3*sin(2*PI*3*t))':s=48000:d=10" \
  -filter_complex "[0]drawtext=fontfile=$font:fontsize=28:fontcolor=white:borderw=2:bordercolor=black@0.6:x=16:y=16:text='%{pts\\:hms}'[v]" \
  -map "[v]" -map 1:a -t 10 "${exact[@]}" \
  -c:v libvpx-vp9 -b:v 0 -crf 54 -g 40 -deadline good -cpu-used 2 -pix_fmt yuv420p -c:a libopus -b:a 32k -ac 1 "$media/7-dive.webm"

# 8: twenty seconds of a slow arpeggio, Ogg Opus.
ffmpeg "${quiet[@]}" \
  -f lavfi -i "aevalsrc='0.3*sin(2*PI*t*220*pow(2\,(3*mod(floor(t*2)\,4)+mod(floor(t/2)\,3))/12))*exp(-3*mod(t\,0.5))+0.12*sin(2*PI*110*t)':s=48000:d=20" \
  -af "aecho=0.8:0.7:180|320:0.35|0.2,afade=t=in:d=0.5,afade=t=out:st=18:d=2" \
  "${exact[@]}" -c:a libopus -b:a 48k -ac 1 "$media/8-arpeggio.ogg"

ls -l "$media"
